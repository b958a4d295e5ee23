"""What is not installed by default."""


def how_to_install(extra: str) -> str:
    """The commands that install an extra: of a checkout, and of the package."""
    return f"python -m pip install '.[{extra}]' in a checkout of mosaics, or 'mosaics[{extra}]' from an index"
