"""Train a model from scratch.

python -m scripts.base_train configs/laptop.toml --model.attention gka
torchrun --standalone --nproc_per_node=8 -m scripts.base_train configs/d20.toml --model.attention gka
"""

import sys

from scripts.cli import RUN_FLAGS, check_flags, parse_config, run


def main() -> None:
    config, flags = parse_config(sys.argv[1:], __doc__, RUN_FLAGS)
    check_flags(flags)
    from gkachat.train.trainer import Trainer  # torch takes seconds to import, --help should not

    Trainer(config, resume="resume" in flags, overwrite="overwrite" in flags).run()


if __name__ == "__main__":
    run(main)
