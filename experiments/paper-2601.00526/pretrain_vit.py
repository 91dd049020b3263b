"""Pretrain the small vision transformer of pacs.toml, on a part of CIFAR-10's training images.

    python experiments/paper-2601.00526/pretrain_vit.py            (some 45 minutes on one core)

Writes runs/vit-cifar10/: `model` (a transformers folder: 1.9 M numbers, 32 x 32 pixels, patches of 4) and `rest.zip` (the images that it
never saw: the test images, on which it is judged, and the other training images, for federated runs on the same classes). A
backbone from a hub needs none of this: name it in [model].
"""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from rich.progress import track
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from fedtailor.doctor import bf16_speed

MEAN = STD = 0.5  # as ViTImageProcessor normalises


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cifar10/cifar10_jpg_20k_train_10k_test.zip"))
    parser.add_argument("--out", type=Path, default=Path("runs/vit-cifar10"))
    parser.add_argument("--share", type=float, default=0.7, help="of the training images, for pretraining")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if not asked.data.is_file():
        parser.error(
            f"--data '{asked.data}' does not exist: name the zip of CIFAR-10 images, train/<class>/*.jpg and test/<class>/*.jpg"
        )
    torch.manual_seed(asked.seed)
    asked.out.mkdir(parents=True, exist_ok=True)
    images, labels, classes = divide(asked.data, asked.out / "rest.zip", asked.share, asked.seed)
    print(f"{len(images)} images for pretraining, the others in {asked.out / 'rest.zip'}")
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=192, num_hidden_layers=6, num_attention_heads=3, intermediate_size=384, image_size=32, patch_size=4,
            num_labels=len(classes), id2label=dict(enumerate(classes)), label2id={name: k for k, name in enumerate(classes)},
        )
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pretrain(model.to(device), images.to(device), labels.to(device), asked.epochs, asked.batch, asked.lr)
    model.float().save_pretrained(asked.out / "model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(asked.out / "model")
    print(f"accuracy on the test images: {judged(model, asked.out / 'rest.zip', classes):.4f}; model in {asked.out / 'model'}")


def divide(source: Path, rest: Path, share: float, seed: int) -> tuple[Tensor, Tensor, list[str]]:
    """Pretraining images (n, 3, 32, 32) with their classes; all others are written to `rest`."""
    chance = torch.Generator().manual_seed(seed)
    pixels, labels = [], []
    with zipfile.ZipFile(source) as given, zipfile.ZipFile(rest, "w") as left:
        names = sorted(name for name in given.namelist() if name.endswith(".jpg"))
        classes = sorted({name.split("/")[-2] for name in names})
        for name in names:
            data = given.read(name)
            if "train/" in name and float(torch.rand(1, generator=chance)) < share:
                pixels.append(decoded(data))
                labels.append(classes.index(name.split("/")[-2]))
            else:
                left.writestr(zipfile.ZipInfo("/".join(name.split("/")[-3:])), data)
    return torch.stack(pixels), torch.tensor(labels), classes


def decoded(data: bytes) -> Tensor:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3).permute(2, 0, 1) / 255
        - MEAN
    ) / STD


def pretrain(model: ViTForImageClassification, images: Tensor, labels: Tensor, epochs: int, batch: int, lr: float) -> None:
    """Supervised, with shifts and mirror images; AdamW, one cycle of the rate; in bf16 where that is faster."""
    half = bf16_speed(images.device.type) > 1.1
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2)
    model.train()
    for _ in track(range(epochs), description="epochs"):
        order = torch.randperm(len(images))
        for start in range(0, len(images) - batch + 1, batch):
            rows = order[start : start + batch]
            with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=half):
                loss = F.cross_entropy(model(pixel_values=augmented(images[rows])).logits, labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def augmented(images: Tensor) -> Tensor:
    """Each image shifted by up to four pixels, and mirrored half of the time."""
    wide = F.pad(images, (4, 4, 4, 4), mode="reflect")
    x, y = torch.randint(0, 9, (2, len(images)))
    across = torch.arange(32)
    rows = (y[:, None] + across)[:, None, :, None]
    columns = (x[:, None] + torch.where(torch.rand(len(images), 1) < 0.5, across, across.flip(0)))[:, None, None, :]
    return wide[torch.arange(len(images))[:, None, None, None], torch.arange(3)[None, :, None, None], rows, columns]


def judged(model: ViTForImageClassification, rest: Path, classes: list[str]) -> float:
    """Accuracy on the test images, batch by batch."""
    model.eval()
    with zipfile.ZipFile(rest) as archive, torch.no_grad():
        names = [name for name in archive.namelist() if name.startswith("test/")]
        right = 0
        for start in range(0, len(names), 256):
            part = names[start : start + 256]
            found = model(
                pixel_values=torch.stack([decoded(archive.read(name)) for name in part]).to(model.device)
            ).logits.argmax(1)
            right += sum(classes[k] == name.split("/")[1] for k, name in zip(found.tolist(), part, strict=True))
    return right / len(names)


if __name__ == "__main__":
    main()
