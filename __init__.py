"""ComfyTP as a custom node: a clone of this repository in custom_nodes works once `pip install .` has built the package."""

import importlib.util
import pathlib

# By its path, not through the package: the node must appear, and say what to do, where the package cannot be imported.
_spec = importlib.util.spec_from_file_location("comfytp_node", pathlib.Path(__file__).parent / "python/comfytp/comfyui/node.py")
_node = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_node)

NODE_CLASS_MAPPINGS = _node.NODE_CLASS_MAPPINGS
NODE_DISPLAY_NAME_MAPPINGS = _node.NODE_DISPLAY_NAME_MAPPINGS
WEB_DIRECTORY = "./web"
engine_stats = _node.engine_stats

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY", "engine_stats"]
