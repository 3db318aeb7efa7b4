"""`python -m loraplus_hydra`, and the program `loraplus-hydra`."""

from __future__ import annotations

from loraplus_hydra.io.interrupts import kept_signals


def main() -> None:
    """Run the command line; a signal is kept from here on."""
    with kept_signals(deliver=False):
        from loraplus_hydra.cli.main import main as run  # imports Hydra: a signal in it would end in a traceback

        run()


if __name__ == "__main__":
    main()
