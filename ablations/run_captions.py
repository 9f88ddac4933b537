"""What captions bring: at several rates, on some images, and as tags. ``--help`` has examples."""

from pathlib import Path

from viladiff.cli.tables import main

if __name__ == "__main__":
    raise SystemExit(main(Path(__file__).with_name("captions.toml")))
