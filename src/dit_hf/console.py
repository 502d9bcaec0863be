"""The console command `dit-hf`: the name of a command, then its flags."""

import sys
from collections.abc import Callable

from ._version import __version__
from .command_line import run


# What `dit-hf --help` shows.
SUMMARIES = {
    "convert": "Convert an original checkpoint to a pipeline folder, and verify it.",
    "export": "Write a pipeline's weights as a checkpoint that the original code loads.",
    "verify": "Compare a converted pipeline with the checkpoint it came from.",
    "latents": "Encode a dataset's images once, for training.",
    "train": "Train or fine-tune a class-conditional DiT.",
    "sample": "Generate a seeded set of images for evaluation.",
    "sweep": "Compare sampling settings by a metric, and plot them.",
    "metrics": "Compute FID and other metrics of a set of images.",
    "generate": "Generate a labelled grid of images.",
    "space": "Open the Gradio page of a pipeline.",
}


def load_command(name: str) -> Callable[[], None]:
    """The main function of a command; its libraries are imported only now, so that `dit-hf --help` is quick."""
    match name:
        case "convert":
            from .commands.convert import main as command
        case "export":
            from .commands.export import main as command
        case "verify":
            from .commands.verify import main as command
        case "latents":
            from .commands.latents import main as command
        case "train":
            from .commands.train import main as command
        case "sample":
            from .commands.sample import main as command
        case "sweep":
            from .commands.sweep import main as command
        case "metrics":
            from .commands.metrics import main as command
        case "generate":
            from .commands.generate import main as command
        case "space":
            from .space.command import main as command
    return command


def main() -> None:
    """Runs `dit-hf COMMAND [flags]`."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name == "--version":
        print(__version__)
    elif name in ("-h", "--help"):
        rows = (f"  {command:<10}{summary}" for command, summary in SUMMARIES.items())
        print("\n".join(("usage: dit-hf COMMAND [flags]; `dit-hf COMMAND --help` lists a command's flags\n", *rows)))
    elif name not in SUMMARIES:
        print(f"error: There is no command {name!r}; choose one of {', '.join(SUMMARIES)}.", file=sys.stderr)
        sys.exit(2)
    else:
        sys.argv = [f"dit-hf {name}", *sys.argv[2:]]  # argparse shows it in the command's usage
        run(lambda: load_command(name)())


if __name__ == "__main__":
    main()
