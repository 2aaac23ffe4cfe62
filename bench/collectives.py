"""`comfytp collectives` beside torch's NCCL on the same GPUs.

    python bench/collectives.py [--program build/comfytp] [--devices cuda:0,cuda:1] [--json FILE] [-- MORE OPTIONS OF comfytp collectives]

NCCL runs in a process a GPU, in a CUDA graph of many calls as ours do, without NVLink multicast (NCCL_NVLS_ENABLE=0). Microseconds a
call, the median of eleven graphs. Needs torch with CUDA.
"""

import argparse
import datetime
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile

import torch
import torch.distributed as dist

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


def collective(op, dtype, size, rank, ranks):
    """A function that makes one call; parts are equal, as NCCL wants them."""
    count = size // dtype.itemsize // ranks * ranks
    whole, part = (torch.ones(n, dtype=dtype, device=f"cuda:{rank}") for n in (count, max(count // ranks, 1)))
    if op == "all_reduce":
        return lambda: dist.all_reduce(whole)
    if op == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole, part)
    if op == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(part, whole)
    received = torch.empty_like(whole)

    def halo():
        neighbours = [n for n in (rank - 1, rank + 1) if 0 <= n < ranks]
        both = [dist.P2POp(f, t, n) for n in neighbours for f, t in ((dist.isend, whole), (dist.irecv, received))]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    return halo


def time_of(call, size):
    repeats = min(max((64 << 20) // size, 4), 200)
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    seconds = []
    for _ in range(12):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(stop) / 1e3 / repeats)
    return statistics.median(seconds[1:])  # the first warms up


def worker(rank, ranks, port, cases, path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NCCL_NVLS_ENABLE="0")
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=ranks, device_id=torch.device("cuda", rank))
    seconds = [time_of(collective(op, DTYPES[dtype], size, rank, ranks), size) for op, dtype, size in cases]
    if rank == 0:
        with open(path, "w") as file:
            json.dump(seconds, file)
    dist.destroy_process_group()


def nccl(cases, ranks, path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, (ranks, port, cases, path), nprocs=ranks)
    with open(path) as file:
        return json.load(file)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--program", default="build/comfytp")
    arguments.add_argument("--devices", default="cuda:0,cuda:1")
    arguments.add_argument("--json")
    arguments.add_argument("more", nargs="*")
    options = arguments.parse_args()

    command = [options.program, "collectives", "--devices", options.devices, "--json", *options.more]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        sys.exit(ran.stderr)
    report = json.loads(ran.stdout)
    times = {}
    for r in report["results"]:
        times.setdefault((r["op"], r["dtype"], r["bytes"]), {})[r["communicator"]] = r["seconds"]
    cases = list(times)
    with tempfile.TemporaryDirectory() as folder:
        for case, seconds in zip(cases, nccl(cases, len(report["devices"]), os.path.join(folder, "nccl.json"))):
            times[case]["nccl"] = seconds

    names = list(times[cases[0]])
    print(f"{'collective':15}{'dtype':6}{'bytes':>12}" + "".join(f"{name + ' us':>12}" for name in names))
    for (op, dtype, size), of in times.items():
        print(f"{op:15}{dtype:6}{size:12,}" + "".join(f"{of[name] * 1e6:12.1f}" for name in names))
    if options.json:
        report |= {
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.date.today().isoformat(),
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "microseconds": [
                {"op": op, "dtype": dtype, "bytes": size, **{name: round(s * 1e6, 2) for name, s in of.items()}}
                for (op, dtype, size), of in times.items()
            ],
        }
        del report["results"]
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
