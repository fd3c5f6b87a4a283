"""Train an image classifier from scratch.

python -m scripts.vision_train configs/vision_digits.toml --model.attention gka
torchrun --standalone --nproc_per_node=8 -m scripts.vision_train configs/vision_imagenet.toml
"""

import sys

from gkachat.vision_config import VisionConfig
from scripts.cli import RUN_FLAGS, parse_config, run


def main() -> None:
    config, flags = parse_config(sys.argv[1:], __doc__, RUN_FLAGS, VisionConfig)
    from gkachat.data.images import load_images
    from gkachat.machine import pick_device
    from gkachat.model.vit import ViT
    from gkachat.train.distributed import destroy_process_group, init_process_group
    from gkachat.train.optim import make_optimizers
    from gkachat.train.setup import build_model, open_run
    from gkachat.train.trainer import Trainer
    from gkachat.train.vision import ImageTask, resolve

    device = pick_device(config.run.device)
    world = init_process_group(device.type, config.run.timeout)
    images = load_images(config)
    config = resolve(config, len(images.train), world.size)
    run_dir = open_run(config, world, resume="resume" in flags, overwrite="overwrite" in flags)

    model = build_model(ViT, config, device)
    model.label_smoothing = config.train.label_smoothing
    optimizers = make_optimizers(model, config.optim, world)
    task = ImageTask(config, images, world)
    Trainer(config, model, optimizers, task, device, world, ema_decay=config.train.ema_decay).fit(run_dir)
    destroy_process_group()


if __name__ == "__main__":
    run(main)
