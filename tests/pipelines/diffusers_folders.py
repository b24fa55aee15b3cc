"""Tiny pipelines with random weights, written to folders by diffusers itself: what a user's download looks like."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.torchvision_ops import declare_missing_operators

declare_missing_operators()
from diffusers import (  # noqa: E402
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import (  # noqa: E402
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
)

__all__ = ["PIPELINES", "DiffusionPipeline", "seeded"]

CHARACTERS = "abcdefghijklmnopqrstuvwxyz"


def seeded(make: Callable[[], Any], seed: int = 7, std: float | None = 0.15) -> Any:
    """A model whose every weight is random, the ones that start at zero included; the global state is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        if std is not None:
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=std)
    return model.eval()


def autoencoder_kl() -> AutoencoderKL:
    """Images of 16x16 in colour to latents of 2x8x8."""
    return seeded(
        lambda: AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=2,
            layers_per_block=1,
            norm_num_groups=2,
            sample_size=16,
            scaling_factor=0.4,
        ),
        std=None,
    )


def autoencoder_dc() -> AutoencoderDC:
    """Images of 16x16 in colour to latents of 4x8x8."""
    return seeded(
        lambda: AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            scaling_factor=0.41,
        ),
        std=None,
    )


def clip(folder: Path) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """A text encoder of twelve places, and a tokenizer of letters."""
    letters = [*CHARACTERS, *(f"{letter}</w>" for letter in CHARACTERS)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters]
    tokenizer = CLIPTokenizer(vocab={word: place for place, word in enumerate(words)}, merges=[], model_max_length=12)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return seeded(lambda: CLIPTextModel(config), std=None), tokenizer


def gemma() -> tuple[Gemma2Model, GemmaTokenizer]:
    """A text encoder whose tokens are letters."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", "\n", *CHARACTERS, *CHARACTERS.upper(), *"'.,:;->!?"]
    tokenizer = GemmaTokenizer(vocab={word: place for place, word in enumerate(words)}, merges=[], add_bos_token=True)
    config = Gemma2Config(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        max_position_embeddings=4096,
    )
    return seeded(lambda: Gemma2Model(config), std=None), tokenizer


def dit_model(*, classes: int, out_channels: int) -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=6,
        in_channels=2,
        out_channels=out_channels,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=classes,
        norm_num_groups=2,
    )


def unet_model(*, channels: int, classes: int | None = None) -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=4,
        num_class_embeds=classes,
    )


def dit(folder: Path) -> DiTPipeline:
    """Classes, latents, learned variance: the shape of DiT-XL/2; the pipeline's "no class" is 1000 whatever it says."""
    model = seeded(lambda: dit_model(classes=1000, out_channels=4))
    pipeline = DiTPipeline(transformer=model, vae=autoencoder_kl(), scheduler=DDIMScheduler(clip_sample=False))
    pipeline.save_pretrained(folder)
    return pipeline


def ddpm(folder: Path) -> DDPMPipeline:
    """Pixels and no condition: the shape of ddpm-cifar10-32."""
    model = seeded(lambda: unet_model(channels=3))
    pipeline = DDPMPipeline(unet=model, scheduler=DDPMScheduler(clip_sample=False))
    pipeline.save_pretrained(folder)
    return pipeline


def unet_condition() -> UNet2DConditionModel:
    return seeded(
        lambda: UNet2DConditionModel(
            sample_size=8,
            in_channels=2,
            out_channels=2,
            block_out_channels=(4, 8),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=2,
            cross_attention_dim=8,
            attention_head_dim=2,
        )
    )


def stable_diffusion(folder: Path, prediction: str = "epsilon") -> StableDiffusionPipeline:
    """Text, latents, a U-Net: the shape of Stable Diffusion 1.5 (and of 2.1, with prediction v_prediction)."""
    text_encoder, tokenizer = clip(folder)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )
    pipeline = StableDiffusionPipeline(
        vae=autoencoder_kl(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet_condition(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return pipeline


def sana(folder: Path) -> SanaPipeline:
    """Text, deeply compressed latents, a flow: the shape of SANA."""
    text_encoder, tokenizer = gemma()
    model = seeded(
        lambda: SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=4,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=8,
            sample_size=8,
            patch_size=1,
        )
    )
    pipeline = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=autoencoder_dc(),
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.save_pretrained(folder)
    return pipeline


PIPELINES: dict[str, Callable[[Path], Any]] = {
    "dit": dit,
    "ddpm": ddpm,
    "stable_diffusion": stable_diffusion,
    "sana": sana,
}
