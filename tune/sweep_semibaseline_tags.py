"""SemiBaseline with tags, tuned as ViLaDiff is. ``--help`` has examples."""

from pathlib import Path

from viladiff.cli.sweeps import main

if __name__ == "__main__":
    raise SystemExit(main(Path(__file__).with_name("sweep_semibaseline_tags.toml")))
