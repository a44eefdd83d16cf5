"""Train the bundled tiny models from captioned 32x32 pictures.

    python benchmarks/train_tiny.py --data tiles.npz --model all --out runs/tiny

`vae` comes first (the teachers read it from --out), then `tiny`, `tiny-flow`, `tiny-dit` and `judge` in any order or at
once. A killed run goes on where it was. Without --minutes the result depends on the seed and the thread count alone.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from tiny_models import autoencoder, data, dit, flow, judging, store, teacher, tokens, unet
from tiny_models.loop import Plan


def main() -> None:
    """Read the arguments and train what was asked for."""
    args = arguments()
    torch.set_num_threads(args.threads)
    tiles = data.load(args.data)
    makers = {"vae": make_vae, "tiny": make_tiny, "tiny-flow": make_flow, "tiny-dit": make_dit, "judge": make_judge}
    for name in makers if args.model == "all" else (args.model,):
        makers[name](tiles, args)


def make_vae(tiles: data.Tiles, args: argparse.Namespace) -> None:
    """Train the autoencoder into OUT/vae/model."""
    folder = args.out / "vae"
    start = AutoencoderKL.from_pretrained(args.start) if args.start else None
    schedule = plan(args, steps=6000, lr=2e-3, warm_up=100)
    vae = autoencoder.train(tiles.centred, schedule, folder, args.kl, start)
    vae.save_pretrained(folder / "model")
    store.halve(folder / "model" / "diffusion_pytorch_model.safetensors")
    print(f"vae: {autoencoder.psnr(vae, tiles.centred):.2f} dB, scaling factor {vae.config.scaling_factor:.4f}")


def make_tiny(tiles: data.Tiles, args: argparse.Namespace) -> None:
    """Train the U-Net into OUT/NAME/model."""
    shape = unet.Shape(tuple(args.widths), args.heads, args.prediction)
    train_teacher(tiles, args, args.name or "tiny", unet, shape, plan(args, steps=5000, lr=8e-4))


def make_flow(tiles: data.Tiles, args: argparse.Namespace) -> None:
    """Train the MMDiT into OUT/NAME/model."""
    train_teacher(tiles, args, args.name or "tiny-flow", flow, flow.Shape(), plan(args, steps=9000, lr=8e-4))


def make_dit(tiles: data.Tiles, args: argparse.Namespace) -> None:
    """Train the transformer of one stream into OUT/NAME/model."""
    schedule = plan(args, steps=6000, lr=1e-3)
    train_teacher(tiles, args, args.name or "tiny-dit", dit, dit.Shape(), schedule, tokens.build_qwen)


def train_teacher(tiles, args, name, family, shape, schedule, learn=tokens.build) -> None:  # type: ignore[no-untyped-def]
    """family: the module `unet`, `flow` or `dit`; learn: the tokenizer of captions.

    Latents and tokens are made once; snapshots go to OUT/snapshot/NAME.
    """
    vae = AutoencoderKL.from_pretrained(args.out / "vae" / "model").eval()
    latents = autoencoder.encode(vae, tiles.centred) * vae.config.scaling_factor * args.latent_std
    vae.register_to_config(scaling_factor=vae.config.scaling_factor * args.latent_std, shift_factor=0.0)
    tokenizer = learn(tiles.captions)

    def write(modules: torch.nn.ModuleDict, folder: Path) -> None:
        store.save(family.pipeline(modules, vae, tokenizer, shape), folder)
        with (args.out / "READY.txt").open("a") as file:
            file.write(f"{name} {folder}\n")

    snapshot = functools.partial(write, folder=args.out / "snapshot" / name)
    prompts = data.Prompts(tiles, tokenizer)
    folder = args.out / name
    modules = teacher.train(family, latents, prompts, tokenizer, shape, schedule, folder, snapshot, args.batch)
    write(modules, folder / "model")
    print(f"{name}: {store.size_bytes(folder / 'model') / 2**20:.1f} MiB")


def make_judge(tiles: data.Tiles, args: argparse.Namespace) -> None:
    """Train the judge into OUT/judge/model."""
    judge = judging.train(tiles, plan(args, steps=1500, lr=2e-3, warm_up=100), args.out / "judge")
    print(f"judge: held out {judge.config['held_out']}, seen {judge.config['seen']}")


def plan(args: argparse.Namespace, steps: int, lr: float, warm_up: int = 200) -> Plan:
    """The default plan of a model with what the command line changes."""
    return Plan(args.steps or steps, args.lr or lr, args.minutes, warm_up, seed=args.seed)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help=".npz with image [N, 32, 32, 3] and caption")
    parser.add_argument("--model", choices=("vae", "tiny", "tiny-flow", "tiny-dit", "judge", "all"), default="all")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints, snapshots and results")
    parser.add_argument("--steps", type=int, default=0, help="updates; 0 = the model's own number")
    parser.add_argument("--minutes", type=float, default=0.0, help="finish after this time; 0 = no limit")
    parser.add_argument("--lr", type=float, default=0.0, help="peak learning rate; 0 = the model's own")
    parser.add_argument("--batch", type=int, default=96, help="pictures per update of a teacher")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kl", type=float, default=1e-5, help="weight of the autoencoder's KL term")
    parser.add_argument("--start", type=Path, help="folder of an autoencoder to train further")
    second = parser.add_argument_group("a second teacher")
    second.add_argument("--name", help="its folder below OUT")
    second.add_argument("--widths", type=int, nargs="+", default=(64, 128), help="channels of the U-Net's levels")
    second.add_argument("--heads", type=int, default=4, help="attention heads of the U-Net")
    second.add_argument("--prediction", choices=("epsilon", "v_prediction"), default="epsilon")
    second.add_argument("--latent-std", type=float, default=1.0, help="standard deviation of the latents")
    return parser.parse_args()


if __name__ == "__main__":
    main()
