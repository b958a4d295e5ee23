"""Tables and numbers for people."""

from collections.abc import Iterable


def show_table(title: str, rows: Iterable[tuple[str, str]], align: str = ">") -> None:
    """Print two columns, the second aligned to the right, or with `<` to the left."""
    rows = list(rows)
    left = max(len(name) for name, _ in rows)
    right = max(len(value) for _, value in rows)
    print(title)
    for name, value in rows:
        print(f"  {name:<{left}}  {value:{align}{right}}".rstrip())


def amount(number: float) -> str:
    """1234567 as 1.23 M."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.4g} {unit}"
    return f"{number:g}"


def size(number: float) -> str:
    """Bytes in KiB, MiB or GiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= scale:
            return f"{number / scale:,.2f} {unit}"
    return f"{number:,.0f} B"
