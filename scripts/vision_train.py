"""Train an image classifier from scratch.

python -m scripts.vision_train configs/vision_digits.toml --model.attention gka
torchrun --standalone --nproc_per_node=8 -m scripts.vision_train configs/vision_imagenet.toml
"""

import sys

from gkachat.vision_config import VisionConfig
from scripts.cli import RUN_FLAGS, check_flags, parse_config, run


def main() -> None:
    config, flags = parse_config(sys.argv[1:], __doc__, RUN_FLAGS, VisionConfig)
    check_flags(flags)
    from gkachat.data.images import load_images  # torch takes seconds to import, --help should not
    from gkachat.train.vision import VisionTrainer

    VisionTrainer(config, load_images(config), resume="resume" in flags, overwrite="overwrite" in flags).run()


if __name__ == "__main__":
    run(main)
