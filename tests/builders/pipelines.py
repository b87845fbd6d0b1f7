"""Tiny real pipelines of every family."""

import json
import string
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LDMPipeline,
    LDMTextToImagePipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

STEPS = 50
SIZE = 16
TOKENS = 12
PIXEL_UNET = {
    "sample_size": SIZE,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
PROMPT_UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
AUTOENCODER = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "sample_size": SIZE,
}
# every family, with a share of the MACs that the grid of its widths has
KEEP = {
    "ddpm": 0.5,
    "ddim": 0.5,
    "labels": 0.5,
    "ldm": 0.48,
    "sd1": 0.55,
    "sd2": 0.32,
    "sdxl": 0.56,
    "ldm_text": 0.73,
}
LATENT_NOISE = {"num_train_timesteps": STEPS, "steps_offset": 1, "beta_schedule": "scaled_linear"}


def tokenizer(folder: Path, tokens: int = TOKENS) -> CLIPTokenizer:
    """CLIP's tokenizer with single characters for a vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    signs = list(string.printable[:94])
    words = [*signs, *(f"{sign}</w>" for sign in signs), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    return CLIPTokenizer(*files, model_max_length=tokens)


def text_config(given: CLIPTokenizer, **changes) -> CLIPTextConfig:
    options = {
        "vocab_size": len(given),
        "hidden_size": 12,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": given.model_max_length,
        "bos_token_id": given.bos_token_id,
        "eos_token_id": given.eos_token_id,
        "pad_token_id": given.pad_token_id,
    }
    return CLIPTextConfig(**options | changes)


def conditional_unet(**changes) -> UNet2DConditionModel:
    return UNet2DConditionModel(**PROMPT_UNET | changes)


def pixels(kind: type = DDPMPipeline, prediction: str = "epsilon", **changes) -> DiffusionPipeline:
    unet = UNet2DModel(**PIXEL_UNET | changes)
    scheduler = DDIMScheduler if kind is DDIMPipeline else DDPMScheduler
    return kind(unet, scheduler(num_train_timesteps=STEPS, prediction_type=prediction))


def unconditional_latent() -> LDMPipeline:
    unet = UNet2DModel(**PIXEL_UNET | {"sample_size": 8, "in_channels": 3, "out_channels": 3})
    scheduler = DDIMScheduler(**LATENT_NOISE, clip_sample=False)
    return LDMPipeline(VQModel(**AUTOENCODER, num_vq_embeddings=16), unet, scheduler)


def stable_diffusion(folder: Path, prediction: str = "epsilon", **changes) -> DiffusionPipeline:
    """1.x, and 2.x with ``prediction="v_prediction"`` and a list of heads."""
    tokens = tokenizer(folder)
    return StableDiffusionPipeline(
        vae=AutoencoderKL(**AUTOENCODER),
        text_encoder=CLIPTextModel(text_config(tokens)),
        tokenizer=tokens,
        unet=conditional_unet(**changes),
        # as Stable Diffusion comes: a scheduler without `get_velocity`
        scheduler=PNDMScheduler(**LATENT_NOISE, skip_prk_steps=True, prediction_type=prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(folder: Path, *, zeros: bool = True) -> DiffusionPipeline:
    tokens = tokenizer(folder / "1"), tokenizer(folder / "2")
    unet = conditional_unet(
        block_out_channels=(16, 32),
        cross_attention_dim=28,
        attention_head_dim=(1, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=10 + 6 * 8,
    )
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(**AUTOENCODER),
        text_encoder=CLIPTextModel(text_config(tokens[0])),
        text_encoder_2=CLIPTextModelWithProjection(
            text_config(tokens[1], hidden_size=16, projection_dim=10)
        ),
        tokenizer=tokens[0],
        tokenizer_2=tokens[1],
        unet=unet,
        # adds noise in a scaling of its own
        scheduler=EulerDiscreteScheduler(**LATENT_NOISE),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )


def latent_text_to_image(folder: Path) -> DiffusionPipeline:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
        LDMBertConfig,
        LDMBertModel,
    )

    tokens = tokenizer(folder, 77)
    bert = LDMBertModel(
        LDMBertConfig(
            vocab_size=len(tokens),
            max_position_embeddings=77,
            encoder_layers=1,
            encoder_ffn_dim=16,
            encoder_attention_heads=2,
            head_dim=6,
            d_model=12,
            pad_token_id=tokens.pad_token_id,
        )
    )
    # the pipeline takes an autoencoder with 8 pixels a latent for granted
    four = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (4, 4, 4, 4),
    }
    return LDMTextToImagePipeline(
        vqvae=AutoencoderKL(**AUTOENCODER | four),
        bert=bert,
        tokenizer=tokens,
        unet=conditional_unet(sample_size=2),
        scheduler=DDIMScheduler(**LATENT_NOISE, clip_sample=False),
    )


def class_transformer(**changes) -> DiTPipeline:
    options = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 1,
        "out_channels": 1,
        "num_layers": 5,
        "sample_size": SIZE,
        "patch_size": 8,
    }
    transformer = DiTTransformer2DModel(**options | changes)
    noise = DDIMScheduler(num_train_timesteps=STEPS)
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    channels = {"in_channels": 1, "out_channels": 1, "latent_channels": 1}
    same_size = AUTOENCODER | blocks | channels | {"block_out_channels": (8,)}
    return DiTPipeline(transformer, AutoencoderKL(**same_size), noise)


BLOCKS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3}
JOINT = {**BLOCKS, "joint_attention_dim": 16}


def t5(width: int) -> tuple[T5Tokenizer, T5EncoderModel]:
    """T5 with single characters for a vocabulary."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -2.0)]
    tokens = T5Tokenizer([*special, *((sign, -3.0) for sign in string.ascii_letters)], extra_ids=0)
    sizes = {"d_model": width, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return tokens, T5EncoderModel(T5Config(vocab_size=len(tokens), **sizes))


def shifted_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(**AUTOENCODER, shift_factor=0.1, scaling_factor=1.5)


def pixart(kind: type = PixArtSigmaPipeline, **changes) -> DiffusionPipeline:
    tokens, encoder = t5(12)
    sizes = {"in_channels": 4, "out_channels": 8, "sample_size": 8, "caption_channels": 12}
    transformer = PixArtTransformer2DModel(**BLOCKS | sizes | {"cross_attention_dim": 16} | changes)
    noise = DDIMScheduler(**LATENT_NOISE, clip_sample=False)
    return kind(tokens, encoder, AutoencoderKL(**AUTOENCODER), transformer, noise)


def stable_diffusion_3(folder: Path) -> DiffusionPipeline:
    tokens = [tokenizer(folder / number) for number in "12"]
    clips = [CLIPTextModelWithProjection(text_config(t, projection_dim=6)) for t in tokens]
    tokens_3, encoder_3 = t5(32)  # the CLIPs beside each other are narrower
    transformer = SD3Transformer2DModel(
        **JOINT | {"joint_attention_dim": 32},
        in_channels=4,
        out_channels=4,
        sample_size=8,
        pooled_projection_dim=12,
        caption_projection_dim=16,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer,
        FlowMatchEulerDiscreteScheduler(STEPS, shift=3.0),
        shifted_autoencoder(),
        *(clips[0], tokens[0], clips[1], tokens[1], encoder_3, tokens_3),
    )


def flux(folder: Path, *, guidance: bool = True) -> DiffusionPipeline:
    """Of 8 x 8 latents, with ``FLUX_TOKENS`` of 16."""
    tokens, (tokens_2, encoder_2) = tokenizer(folder), t5(16)
    transformer = FluxTransformer2DModel(
        **JOINT | {"num_layers": 2},
        in_channels=16,
        pooled_projection_dim=12,
        num_single_layers=2,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=guidance,
    )
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(STEPS, use_dynamic_shifting=True),
        shifted_autoencoder(),
        CLIPTextModel(text_config(tokens)),
        tokens,
        encoder_2,
        tokens_2,
        transformer,
    )


def build(name: str, folder: Path) -> DiffusionPipeline:
    """A seeded pipeline in evaluation mode, silent."""
    torch.manual_seed(1)
    makers = {
        "ddpm": pixels,
        "ddim": lambda: pixels(DDIMPipeline, "sample"),
        "labels": lambda: pixels(num_class_embeds=10),
        "ldm": unconditional_latent,
        "sd1": lambda: stable_diffusion(folder / "words"),
        "sd2": lambda: stable_diffusion(
            folder / "words", "v_prediction", attention_head_dim=(1, 2), use_linear_projection=True
        ),
        "sdxl": lambda: stable_diffusion_xl(folder / "words"),
        "ldm_text": lambda: latent_text_to_image(folder / "words"),
        "dit": class_transformer,
        "pixart": pixart,
        "sd3": lambda: stable_diffusion_3(folder / "words"),
        "flux": lambda: flux(folder / "words"),
    }
    pipeline = makers[name]()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pictures(folder: Path, count: int = 24, size: int = SIZE, column: str = "text") -> Path:
    """Pictures of two colours in two subfolders, with a caption each."""
    colours = {"blue": (20, 30, 220), "red": (230, 20, 30)}
    rows = []
    for k in range(count):
        name = sorted(colours)[k % 2]
        (folder / name).mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", (size, size), colours[name])
        picture.putpixel((k % size, k % 7), (255, 255, 255))
        picture.save(folder / name / f"{k:02}.png")
        rows.append({"file_name": f"{name}/{k:02}.png", column: f"{name} {k}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
