"""What the importer raises when a model cannot become a graph."""


class Unsupported(Exception):
    """A module, argument or op that the importer cannot translate; the text names it and where it stands."""
