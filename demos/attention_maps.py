"""Attention of three families on a photograph: rollout and single heads, as docs/pictures/attention_maps.png.

    python demos/attention_maps.py [--out docs/pictures/attention_maps.png]

The photograph is scikit-learn's china.jpg. No published weights come with this package, so what is shown is the reach
of each architecture, not what a trained model looks at: DeiT and Agent-DeiT have random weights, and DiNAT is the
embedded miniature, which was trained on drawn shapes and has never seen a photograph.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import timm
import torch
from matplotlib import pyplot
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

import attnzoo
from attnzoo.backbones import attention_maps, attention_rollout
from attnzoo.miniatures import classifiers


def models() -> dict[str, tuple[nn.Module, int]]:
    """{title: (model, side of its image)}."""
    torch.manual_seed(0)
    return {
        "DeiT-T\nrandom weights": (timm.create_model("deit_tiny_patch16_224").eval(), 224),
        "DiNAT, embedded miniature\n(trained on drawn shapes)": (classifiers.load("dinat_world"), 96),
        "Agent-DeiT-T\nrandom weights": (timm.create_model("agent_deit_tiny").eval(), 224),
    }


def prepared(model: nn.Module, picture: Image.Image) -> Tensor:
    """A square picture as the model wants it, [3, side, side]."""
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    image = pixels.view(picture.height, picture.width, 3).permute(2, 0, 1) / 255.0
    return (image - mean) / std


def draw(out: Path) -> Path:
    """The picture: one row a family; crosses mark the token whose reading is shown."""
    china = Image.fromarray(load_sample_image("china.jpg"))
    side = min(china.size)
    china = china.crop((100, 0, 100 + side, side))
    chosen = models()
    figure, axes = pyplot.subplots(len(chosen), 5, figsize=(13, 2.75 * len(chosen)), layout="constrained")
    for row, (title, (model, pixels)) in zip(axes, chosen.items()):
        picture = china.resize((pixels, pixels), Image.Resampling.BICUBIC)
        image = prepared(model, picture)
        flow = attention_rollout(model, image)
        middle = attention_maps(model, image, layer=1)
        panels = {"rollout, all layers": (flow, flow.from_token(*(n // 2 for n in flow.query_grid))[0])}
        for head in range(2):
            panels[f"second layer, head {head}"] = (
                middle,
                middle.from_token(*(n // 2 for n in middle.query_grid))[head],
            )
        panels["rollout, mean of all tokens"] = (flow, flow.mean()[0])
        row[0].imshow(picture)
        row[0].set_ylabel(title, fontsize=9)
        for axis, (name, (found, values)) in zip(row[1:], panels.items()):
            axis.imshow(values, cmap="viridis", extent=(0, pixels, pixels, 0))
            axis.set_title(name, fontsize=9)
            if "mean" not in name:
                height, width = found.query_grid
                place = ((width // 2 + 0.5) / width * pixels, (height // 2 + 0.5) / height * pixels)
                axis.plot(*place, "+", color="#ff4040", markersize=9)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=80)
    pyplot.close(figure)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/attention_maps.png"))
    print(draw(parser.parse_args().out), f"(attnzoo {attnzoo.__version__})")
