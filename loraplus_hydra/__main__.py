"""`python -m loraplus_hydra`, and the program `loraplus-hydra`."""

from __future__ import annotations

from loraplus_hydra.io.interrupts import kept_signals


def main() -> None:
    """Run the command line. From here on, signals are stored as a flag."""
    with kept_signals(deliver=False):
        # Importing Hydra takes time, and a signal during the import would cause a traceback
        from loraplus_hydra.cli.main import main as run

        run()


if __name__ == "__main__":
    main()
