"""What every figure needs: matplotlib without a screen, and a file that is whole or the old one."""

from io import BytesIO
from pathlib import Path

from empf.files import write_atomic


def pyplot():
    """`matplotlib.pyplot`, drawing into memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save_figure(plt, figure, path: Path, dpi: int = 300) -> None:
    """Save in the format of the path's suffix, and close."""
    buffer = BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=dpi)
    plt.close(figure)
    write_atomic(path, buffer.getvalue())
