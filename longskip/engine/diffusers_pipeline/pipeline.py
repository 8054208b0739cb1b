"""Text to pictures with the U-ViT of this folder, in torch and diffusers alone.

from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
pipe("a small red circle, center", num_inference_steps=25, guidance_scale=3.0).images[0]
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor


class UViTPipeline(DiffusionPipeline):
    """``objective`` flow (a rectified flow, Euler steps) or ddpm (DDIM steps); ``prediction``: what the model gives, v, x
    or epsilon. ``factor``: pixels per latent, None for a model that draws pixels in [−1, 1] and has no ``vae``.
    ``truncate``: texts that are too long for a frozen encoder are cut, and refused otherwise."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer"]  # noqa: RUF012 - diffusers' form

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        objective: str = "flow",
        prediction: str = "v",
        factor: int | None = None,
        truncate: bool = False,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(objective=objective, prediction=prediction, factor=factor, truncate=truncate)

    def encode_prompt(self, prompts: list[str]) -> tuple[Tensor | None, Tensor | None]:
        """Prompts → features (B, n_txt, E) and, of a frozen encoder, the mask of the tokens to attend to (B, n_txt)."""
        n_txt = self.transformer.config.n_txt
        if not n_txt:
            return None, None
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("this folder holds no text encoder: give text_encoder and tokenizer to from_pretrained")
        device = self._execution_device
        if hasattr(self.text_encoder, "embedding"):  # the word encoder that was trained with the model
            return self.text_encoder(self.tokenizer(prompts).to(device)), None
        longest = max(len(ids) for ids in self.tokenizer(prompts, truncation=False).input_ids)
        if longest > n_txt and not self.config.truncate:
            raise ValueError(f"a prompt has {longest} tokens; the limit is {n_txt}")
        read = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=n_txt,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        ids, mask = read.input_ids.to(device), read.attention_mask.to(device).bool()
        if self.text_encoder.config.model_type == "t5":
            return self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask
        return self.text_encoder(input_ids=ids).last_hidden_state, None  # CLIP's padding is attended to as well

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 3.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """One picture a prompt.

        ``height``, ``width``: pixels, the model's by default (positions are interpolated). ``latents`` (B, C, h, w): the
        noise to start from, drawn by ``generator`` otherwise. ``guidance_scale`` 1 is none. ``output_type``: pil, np
        (B, H, W, 3) in [0, 1], pt (B, 3, H, W) in [0, 1], or latent.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        device, config = self._execution_device, self.transformer.config
        factor = self.config.factor or 1
        shape = (
            len(prompts),
            config.channels,
            height // factor if height else config.sample_size[0],
            width // factor if width else config.sample_size[1],
        )
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, not {shape}")
        x = latents.to(device, torch.float32)
        guided = guidance_scale != 1.0 and config.n_txt > 0  # one pass over both: the prompts, then the empty one
        told = self.encode_prompt(prompts + [""] * len(prompts) if guided else prompts)
        scheduler, steps = self._schedule(num_inference_steps, device)
        for step, now in self.progress_bar(steps):
            time = torch.full((x.shape[0],), now, device=device)
            both = 2 if guided else 1
            out = self.transformer(torch.cat([x] * both), torch.cat([time] * both), *told)
            if guided:
                conditional, unconditional = out.chunk(2)
                out = unconditional + guidance_scale * (conditional - unconditional)
            if self.config.objective == "flow" and self.config.prediction == "x":
                out = (x - out) / time.view(-1, 1, 1, 1)  # the velocity that the scheduler's step takes
            x = scheduler.step(out, step, x, return_dict=False)[0]

        images = x if output_type == "latent" else self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _schedule(self, steps: int, device: torch.device) -> tuple[Any, list[tuple[Tensor, float]]]:
        """The scheduler, set, with its time steps and the time in [0, 1] that the model is given at each."""
        scheduler, total = self.scheduler, self.scheduler.config.num_train_timesteps
        if self.config.objective == "flow":
            # Equal steps from 1 to 0, which the scheduler shifts; its own default ends at 1/1000.
            scheduler.set_timesteps(sigmas=[1.0 - i / steps for i in range(steps)], device=device)
        elif isinstance(scheduler, DDIMScheduler) and total % steps and steps < total:
            # It would go back ⌊total/steps⌋ each time and miss the step that it visits next; given the visited steps as
            # a schedule of their own, of which every step is made, it does not.
            visited = [round(total * (i + 1) / steps) - 1 for i in range(steps)]
            kept = scheduler.alphas_cumprod.double()[visited]
            betas = 1 - kept / torch.cat([torch.ones(1, dtype=kept.dtype), kept[:-1]])
            own = DDIMScheduler.from_config(
                scheduler.config, num_train_timesteps=steps, trained_betas=betas.tolist(), timestep_spacing="trailing"
            )
            own.set_timesteps(steps, device=device)
            return own, [(step, k / total) for step, k in zip(own.timesteps, reversed(visited), strict=True)]
        else:
            scheduler.set_timesteps(steps, device=device)
        return scheduler, [(step, float(step) / total) for step in scheduler.timesteps]

    def _decode(self, x: Tensor, output_type: str) -> Any:
        if self.config.factor is not None:
            if self.vae is None:
                raise ValueError(
                    "this folder holds no vae: give one to from_pretrained, or ask for output_type='latent'"
                )
            config = self.vae.config
            x = self.vae.decode((x / config.scaling_factor + (config.shift_factor or 0.0)).to(self.vae.dtype)).sample
        pixels = (x.float().clamp(-1, 1) + 1) / 2
        if output_type == "pt":
            return pixels
        grid = pixels.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return grid
        return [Image.fromarray((picture * 255).round().astype("uint8")) for picture in grid]
