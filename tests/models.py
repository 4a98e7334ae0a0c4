"""The model zoo that tests and benchmarks share: real architectures, random weights, no downloads.

    from models import MODELS
    spec = MODELS["resnet18"]
    module = spec.build("tiny")               # or "real": the published configuration
    inputs = spec.inputs("tiny", batch=2)     # dict of CPU tensors
    loss = spec.loss(module, inputs)

Everything is float32 on the CPU, seeded, and free of dropout, so that two devices can be compared.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Inputs = dict[str, Tensor]
Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Model:
    name: str
    make: Callable[[str], nn.Module]  # "tiny" | "real" -> module
    make_inputs: Callable[[str, int], Inputs]  # size, batch -> tensors, targets among them
    forward: Callable[[nn.Module, Inputs], Outputs]  # what inference computes
    loss: Callable[[nn.Module, Inputs], Tensor]  # a scalar
    generate: Callable[[nn.Module, Inputs, int], Tensor] | None = None  # greedy decoding of n tokens, with a KV cache

    def build(self, size: str = "tiny", seed: int = 0) -> nn.Module:
        """A freshly initialised module, on the CPU, in training mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make(size).train()

    def inputs(self, size: str = "tiny", batch: int = 2, seed: int = 1) -> Inputs:
        """Seeded inputs and targets, on the CPU."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make_inputs(size, batch)


MODELS: dict[str, Model] = {}


def _add(name: str, make, make_inputs, forward, loss, generate=None) -> None:
    MODELS[name] = Model(name, make, make_inputs, forward, loss, generate)


def to(inputs: Inputs, device: torch.device | str, dtype: torch.dtype | None = None) -> Inputs:
    """Inputs on a device; floating ones in dtype where one is given."""
    return {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}


@contextlib.contextmanager
def _without_torchvision_kernels() -> Iterator[None]:
    """torchvision's compiled ops need its own build of torch; its models don't need them."""
    register_fake = torch.library.register_fake

    def skip_torchvision(op, func=None, /, **kwargs):
        if isinstance(op, str) and op.startswith("torchvision::"):
            return func if func is not None else lambda f: f
        return register_fake(op, func, **kwargs)

    torch.library.register_fake = skip_torchvision
    try:
        yield
    finally:
        torch.library.register_fake = register_fake


def _import_torchvision() -> None:
    with _without_torchvision_kernels():
        import torchvision.models  # noqa: F401


# Image classifiers


def _torchvision(name: str, **kwargs: Any) -> nn.Module:
    _import_torchvision()
    import torchvision.models as zoo

    return getattr(zoo, name)(weights=None, **kwargs)


def _classify(m: nn.Module, i: Inputs) -> Tensor:
    return m(i["x"])


def _classification_loss(m: nn.Module, i: Inputs) -> Tensor:
    return F.cross_entropy(m(i["x"]), i["y"])


def _images(tiny: int, classes: int = 10):
    def inputs(size: str, batch: int) -> Inputs:
        side, n = (tiny, classes) if size == "tiny" else (224, 1000)
        return {"x": torch.randn(batch, 3, side, side), "y": torch.randint(n, (batch,))}

    return inputs


class MLP(nn.Sequential):
    """Linear layers with GELU between them."""

    def __init__(self, *features: int) -> None:
        layers: list[nn.Module] = []
        for i, o in itertools.pairwise(features):
            layers += [nn.Linear(i, o), nn.GELU()]
        super().__init__(*layers[:-1])


def _mlp_inputs(size: str, batch: int) -> Inputs:
    return {"x": torch.randn(batch, 32 if size == "tiny" else 784), "y": torch.randint(10, (batch,))}


_add(
    "mlp",
    lambda size: MLP(32, 64, 64, 10) if size == "tiny" else MLP(784, 1024, 1024, 10),
    _mlp_inputs,
    _classify,
    _classification_loss,
)


def _resnet(blocks: str, layers: list[int]):
    def make(size: str) -> nn.Module:
        if size == "real":
            return _torchvision("resnet18" if blocks == "BasicBlock" else "resnet50")
        _import_torchvision()
        from torchvision.models import resnet

        # Same blocks and stages, but a quarter of the width, which torchvision fixes: narrow the stem afterwards.
        net = resnet.ResNet(getattr(resnet, blocks), layers, num_classes=10, width_per_group=64)
        return _narrow(net, 8)

    return make


def _narrow(module: nn.Module, factor: int) -> nn.Module:
    """Divides the channels of every convolution and batch norm (but the 3 input channels and the classes)."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            cin = child.in_channels if child.in_channels == 3 else child.in_channels // factor
            groups = child.groups if child.groups == 1 else child.groups // factor
            setattr(
                module,
                name,
                nn.Conv2d(
                    cin,
                    child.out_channels // factor,
                    child.kernel_size,
                    child.stride,
                    child.padding,
                    child.dilation,
                    groups,
                    child.bias is not None,
                ),
            )
        elif isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.BatchNorm2d(child.num_features // factor))
        elif isinstance(child, nn.Linear):
            setattr(module, name, nn.Linear(child.in_features // factor, child.out_features))
        else:
            _narrow(child, factor)
    return module


_add("resnet18", _resnet("BasicBlock", [1, 1, 1, 1]), _images(48), _classify, _classification_loss)
_add("resnet50", _resnet("Bottleneck", [1, 1, 1, 1]), _images(48), _classify, _classification_loss)


def _mobilenet_v2(size: str) -> nn.Module:
    if size == "real":
        return _torchvision("mobilenet_v2", dropout=0.0)
    setting = [[1, 8, 1, 1], [6, 16, 1, 2], [6, 16, 1, 1], [6, 24, 1, 2]]
    return _torchvision("mobilenet_v2", num_classes=10, width_mult=1.0, dropout=0.0, inverted_residual_setting=setting)


def _mobilenet_v3(size: str) -> nn.Module:
    if size == "real":
        return _torchvision("mobilenet_v3_small", dropout=0.0)
    _import_torchvision()
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

    # in, kernel, expanded, out, squeeze-and-excitation, activation (ReLU or Hardswish), stride, dilation, width
    blocks = [
        InvertedResidualConfig(16, 3, 16, 16, True, "RE", 2, 1, 0.5),
        InvertedResidualConfig(16, 3, 72, 24, False, "RE", 2, 1, 0.5),
        InvertedResidualConfig(24, 5, 96, 40, True, "HS", 2, 1, 0.5),
        InvertedResidualConfig(40, 5, 240, 40, True, "HS", 1, 1, 0.5),
    ]
    return MobileNetV3(blocks, last_channel=64, num_classes=10, dropout=0.0)


_add("mobilenet_v2", _mobilenet_v2, _images(32), _classify, _classification_loss)
_add("mobilenet_v3", _mobilenet_v3, _images(32), _classify, _classification_loss)


def _vit(size: str) -> nn.Module:
    if size == "real":
        return _with_random_head(_torchvision("vit_b_16"))
    _import_torchvision()
    from torchvision.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
    )
    return _with_random_head(vit)


def _with_random_head(vit: nn.Module) -> nn.Module:
    """torchvision starts ViT's head at zero, which would hide every error below it."""
    nn.init.normal_(vit.heads.head.weight, std=0.02)
    return vit


_add("vit_b_16", _vit, _images(32), _classify, _classification_loss)


# Dense prediction


class UNet(nn.Module):
    """The U-Net of Ronneberger et al. with batch norm: (B, cin, H, W) -> (B, cout, H, W); 2^depth divides H, W."""

    def __init__(self, cin: int, cout: int, width: int, depth: int) -> None:
        super().__init__()
        widths = [width << i for i in range(depth + 1)]
        self.down = nn.ModuleList(self.block(i, o) for i, o in zip([cin, *widths], widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(widths[:-1]))
        self.merge = nn.ModuleList(self.block(2 * w, w) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, cout, 1)

    @staticmethod
    def block(cin: int, cout: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(cin, cout, 3, padding=1, bias=False),
            nn.BatchNorm2d(cout),
            nn.ReLU(inplace=True),
            nn.Conv2d(cout, cout, 3, padding=1, bias=False),
            nn.BatchNorm2d(cout),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], 1))
        return self.head(x)


def _unet_inputs(size: str, batch: int) -> Inputs:
    side = 16 if size == "tiny" else 128
    return {"x": torch.randn(batch, 3, side, side), "y": torch.randint(4, (batch, side, side))}


_add(
    "unet",
    lambda size: UNet(3, 4, 8, 2) if size == "tiny" else UNet(3, 4, 32, 4),
    _unet_inputs,
    _classify,
    _classification_loss,
)


class Detector(nn.Module):
    """A small YOLO: CSP-like backbone, top-down feature pyramid, anchor-free head with one prediction a cell.

    Trained one-to-one (a box belongs to the one cell its centre is in), so inference takes the top k and needs no NMS.
    Raw output: (B, cells, 4 + classes); boxes as distances to the cell's centre, in cells.
    """

    strides = (8, 16)

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        c = self.conv
        self.stem = nn.Sequential(c(3, width, 3, 2), c(width, 2 * width, 3, 2))
        self.stage3 = nn.Sequential(c(2 * width, 4 * width, 3, 2), c(4 * width, 4 * width, 3, 1))
        self.stage4 = nn.Sequential(c(4 * width, 8 * width, 3, 2), c(8 * width, 4 * width, 1, 1))
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.mix = c(8 * width, 4 * width, 1, 1)
        self.fuse = c(8 * width, 4 * width, 3, 1)
        self.head = nn.ModuleList(
            nn.Sequential(c(4 * width, 4 * width, 3, 1), nn.Conv2d(4 * width, 4 + classes, 1)) for _ in self.strides
        )

    @staticmethod
    def conv(cin: int, cout: int, kernel: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(cout), nn.SiLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        p3 = self.stage3(self.stem(x))
        p4 = self.stage4(p3)
        p4 = self.mix(torch.cat([p4, self.pool(p4)], 1))
        p3 = self.fuse(torch.cat([p3, F.interpolate(p4, scale_factor=2.0, mode="nearest")], 1))
        levels = [head(p).flatten(2) for head, p in zip(self.head, (p3, p4), strict=True)]
        return torch.cat(levels, 2).transpose(1, 2)

    def cells(self, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Centres (cells, 2) as x, y in pixels, and strides (cells, 1)."""
        centres, strides = [], []
        for s in self.strides:
            y = (torch.arange(height // s, device=device) + 0.5) * s
            x = (torch.arange(width // s, device=device) + 0.5) * s
            grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
            centres.append(grid)
            strides.append(torch.full((len(grid), 1), float(s), device=device))
        return torch.cat(centres), torch.cat(strides)

    def decode(self, raw: Tensor, height: int, width: int) -> Tensor:
        """Boxes (B, cells, 4) as x0, y0, x1, y1 in pixels."""
        centres, strides = self.cells(height, width, raw.device)
        centres, strides = centres.to(raw.dtype), strides.to(raw.dtype)
        reach = F.softplus(raw[..., :4]) * strides
        return torch.cat([centres - reach[..., :2], centres + reach[..., 2:]], -1)

    def detect(self, x: Tensor, k: int = 10) -> tuple[Tensor, Tensor, Tensor]:
        """The k best boxes (B, k, 4), their scores (B, k) and classes (B, k)."""
        raw = self(x)
        scores, best = raw[..., 4:].sigmoid().flatten(1).topk(k, 1)
        cell, label = best // self.classes, best % self.classes
        boxes = self.decode(raw, *x.shape[-2:])
        return boxes.gather(1, cell.unsqueeze(-1).expand(-1, -1, 4)), scores, label


def _detector_inputs(size: str, batch: int) -> Inputs:
    side, boxes = (32, 2) if size == "tiny" else (320, 8)
    corner = torch.rand(batch, boxes, 2) * side / 2
    return {
        "x": torch.randn(batch, 3, side, side),
        "boxes": torch.cat([corner, corner + side / 4 + torch.rand(batch, boxes, 2) * side / 4], -1),
        "labels": torch.randint(4, (batch, boxes)),
    }


def _detector_loss(m: nn.Module, i: Inputs) -> Tensor:
    assert isinstance(m, Detector)
    raw = m(i["x"])
    height, width = i["x"].shape[-2:]
    boxes, labels = i["boxes"], i["labels"]
    centres, _ = m.cells(height, width, raw.device)
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2
    cell = (middle.unsqueeze(2) - centres.to(boxes.dtype)).square().sum(-1).argmin(-1)  # (B, boxes)
    wanted = torch.zeros_like(raw[..., 4:])
    b = torch.arange(len(raw), device=raw.device).unsqueeze(1).expand_as(cell)
    wanted[b, cell, labels] = 1.0
    p, t = m.decode(raw, height, width)[b, cell], boxes
    overlap = (torch.minimum(p[..., 2:], t[..., 2:]) - torch.maximum(p[..., :2], t[..., :2])).clamp(min=0).prod(-1)
    union = (p[..., 2:] - p[..., :2]).prod(-1) + (t[..., 2:] - t[..., :2]).prod(-1) - overlap
    return F.binary_cross_entropy_with_logits(raw[..., 4:], wanted) + (1 - overlap / union).mean()


_add(
    "yolo",
    lambda size: Detector(4, 4) if size == "tiny" else Detector(4, 16),
    _detector_inputs,
    lambda m, i: m.detect(i["x"])[:2],
    _detector_loss,
)


class DCGAN(nn.Module):
    """The generator and discriminator of Radford et al. for images of side 4 · 2^stages."""

    def __init__(self, noise: int, width: int, stages: int) -> None:
        super().__init__()
        g: list[nn.Module] = [
            nn.ConvTranspose2d(noise, width << (stages - 1), 4, bias=False),
            nn.BatchNorm2d(width << (stages - 1)),
            nn.ReLU(),
        ]
        d: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
        for s in reversed(range(1, stages)):
            w = width << s
            g += [nn.ConvTranspose2d(w, w // 2, 4, 2, 1, bias=False), nn.BatchNorm2d(w // 2), nn.ReLU()]
        for s in range(1, stages):
            w = width << s
            d += [nn.Conv2d(w // 2, w, 4, 2, 1, bias=False), nn.BatchNorm2d(w), nn.LeakyReLU(0.2)]
        self.generator = nn.Sequential(*g, nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False), nn.Tanh())
        self.discriminator = nn.Sequential(*d, nn.Conv2d(width << (stages - 1), 1, 4, bias=False), nn.Flatten(0))

    def forward(self, noise: Tensor) -> Tensor:
        return self.discriminator(self.generator(noise))


def _dcgan_inputs(size: str, batch: int) -> Inputs:
    side, noise = (16, 8) if size == "tiny" else (64, 100)
    return {"real": torch.randn(batch, 3, side, side).clamp(-1, 1), "noise": torch.randn(batch, noise, 1, 1)}


def _dcgan_loss(m: nn.Module, i: Inputs) -> Tensor:
    assert isinstance(m, DCGAN)
    fake = m.generator(i["noise"])
    real_score, fake_score = m.discriminator(i["real"]), m.discriminator(fake.detach())
    loss = F.binary_cross_entropy_with_logits(real_score, torch.ones_like(real_score))
    loss = loss + F.binary_cross_entropy_with_logits(fake_score, torch.zeros_like(fake_score))
    m.discriminator.requires_grad_(False)  # the generator's loss trains the generator alone
    score = m.discriminator(fake)
    m.discriminator.requires_grad_(True)
    return loss + F.binary_cross_entropy_with_logits(score, torch.ones_like(score))


_add(
    "dcgan",
    lambda size: DCGAN(8, 8, 2) if size == "tiny" else DCGAN(100, 64, 4),
    _dcgan_inputs,
    lambda m, i: m(i["noise"]),
    _dcgan_loss,
)


# Language and speech


def _bert(size: str) -> nn.Module:
    _import_torchvision()  # transformers imports it
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    if size == "tiny":
        config.update(
            {
                "vocab_size": 97,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "max_position_embeddings": 32,
            }
        )
    return BertForMaskedLM(config)


def _bert_inputs(size: str, batch: int) -> Inputs:
    vocabulary, length = (97, 16) if size == "tiny" else (30522, 128)
    ids = torch.randint(vocabulary, (batch, length))
    mask = torch.ones_like(ids)
    mask[-1, length - length // 4 :] = 0
    labels = ids.masked_fill((torch.rand(batch, length) < 0.7) | (mask == 0), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _logits(m: nn.Module, i: Inputs) -> Tensor:
    return m(**{k: v for k, v in i.items() if k != "labels"}).logits


def _hf_loss(m: nn.Module, i: Inputs) -> Tensor:
    return m(**i).loss


_add("bert", _bert, _bert_inputs, _logits, _hf_loss)


def gpt2(vocabulary: int, positions: int, width: int, layers: int, heads: int) -> nn.Module:
    """A GPT-2 of transformers with the given shape, without dropout."""
    _import_torchvision()  # transformers imports it
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=positions,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def _tokens(tiny: tuple[int, int], real: tuple[int, int]):
    def inputs(size: str, batch: int) -> Inputs:
        vocabulary, length = tiny if size == "tiny" else real
        ids = torch.randint(1, vocabulary, (batch, length))
        return {"input_ids": ids, "labels": ids}

    return inputs


def _gpt2_generate(m: nn.Module, i: Inputs, n: int) -> Tensor:
    ids = i["input_ids"][:, : max(1, i["input_ids"].shape[1] // 2)]
    return m.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=n,
        min_new_tokens=n,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )


_add(
    "gpt2",
    lambda size: gpt2(97, 64, 32, 2, 2) if size == "tiny" else gpt2(50257, 1024, 768, 12, 12),
    _tokens((97, 16), (50257, 128)),
    _logits,
    _hf_loss,
    _gpt2_generate,
)
_add(
    "gpt_4x256",  # four layers: the one that is trained
    lambda size: gpt2(97, 64, 64, 4, 4) if size == "tiny" else gpt2(8192, 128, 256, 4, 4),
    _tokens((97, 32), (8192, 128)),
    _logits,
    _hf_loss,
    _gpt2_generate,
)


def _whisper(size: str) -> nn.Module:
    _import_torchvision()  # transformers imports it
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    tiny: dict[str, Any] = {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_source_positions": 24,
        "max_target_positions": 32,
    }
    common: dict[str, Any] = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    if size == "tiny":
        common |= tiny | {
            "vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3,
            "suppress_tokens": None, "begin_suppress_tokens": None,
        }  # fmt: skip
    model = WhisperForConditionalGeneration(WhisperConfig(**common))  # the defaults are whisper-tiny
    model.generation_config.update(suppress_tokens=None, begin_suppress_tokens=None, forced_decoder_ids=None)
    return model


def _whisper_inputs(size: str, batch: int) -> Inputs:
    vocabulary, frames, length = (97, 48, 8) if size == "tiny" else (51865, 3000, 32)
    return {"input_features": torch.randn(batch, 80, frames), "labels": torch.randint(4, vocabulary, (batch, length))}


def _whisper_generate(m: nn.Module, i: Inputs, n: int) -> Tensor:
    return m.generate(
        i["input_features"],
        attention_mask=torch.ones_like(i["input_features"][:, 0], dtype=torch.long),
        max_new_tokens=n,
        min_new_tokens=n,
        do_sample=False,
        use_cache=True,
        return_timestamps=False,
    )


_add(
    "whisper",
    _whisper,
    _whisper_inputs,
    lambda m, i: m(input_features=i["input_features"], decoder_input_ids=i["labels"]).logits,
    lambda m, i: m(input_features=i["input_features"], labels=i["labels"]).loss,
    _whisper_generate,
)


class RecurrentLM(nn.Module):
    """Embedding, two recurrent layers, projection: tokens (B, T) -> logits (B, T, vocabulary)."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU], vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.rnn = cell(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(ids))[0])


def _lm_loss(m: nn.Module, i: Inputs) -> Tensor:
    return F.cross_entropy(m(i["input_ids"][:, :-1]).flatten(0, 1), i["labels"][:, 1:].flatten())


for _name, _cell in (("lstm", nn.LSTM), ("gru", nn.GRU)):
    _add(
        _name,
        lambda size, cell=_cell: RecurrentLM(cell, 97, 24) if size == "tiny" else RecurrentLM(cell, 8192, 256),
        _tokens((97, 8), (8192, 64)),
        lambda m, i: m(i["input_ids"]),
        _lm_loss,
    )


# ---- comparison with the CPU -----------------------------------------------------------------------------------------
# A result may be off from float64 by a small multiple of what the CPU's own float32 is off, so tolerances follow each model's
# conditioning and none is picked by hand.


def error(result: Tensor, reference: Tensor, scale: float = 0.0) -> float:
    """Normwise relative error; a reference whose norm is below scale counts as scale."""
    result, reference = result.detach().cpu().double(), reference.detach().double()
    assert result.shape == reference.shape
    if not reference.isfinite().all():
        raise AssertionError("the reference is not finite")
    return float((result - reference).norm() / max(float(reference.norm()), scale, 1e-12))


def assert_as_good(result: Tensor, cpu: Tensor, exact: Tensor, what: str, scale: float = 0.0) -> None:
    """result is as near to the float64 one as the CPU's float32, within a factor and a floor."""
    allowed = 2e-6 + 8 * error(cpu, exact, scale)
    off = error(result, exact, scale)
    assert off <= allowed, f"{what}: off by {off:.2e}, allowed {allowed:.2e}"  # also fails on NaN


def outputs(spec: Model, module: nn.Module, inputs: Inputs) -> tuple[Tensor, ...]:
    """What inference computes, as a tuple."""
    out = spec.forward(module, inputs)
    return out if isinstance(out, tuple) else (out,)


def check_inference(
    spec: Model, device: torch.device, run: Callable[[nn.Module, Inputs], tuple[Tensor, ...]], calls: int = 1
) -> None:
    """The outputs of run(module, inputs) on a device, the last of several calls, against `outputs` on the CPU."""
    module, inputs = spec.build().eval(), spec.inputs(batch=3)
    with torch.no_grad():
        cpu = outputs(spec, module, inputs)
        exact = outputs(spec, copy.deepcopy(module).double(), to(inputs, "cpu", torch.float64))
        module.to(device)
        for _ in range(calls):
            ours = run(module, to(inputs, device))
    for k, (o, c, e) in enumerate(zip(ours, cpu, exact, strict=True)):
        assert o.device.type == device.type
        assert_as_good(o, c, e, f"output {k}")


def check_backward(spec: Model, device: torch.device, loss: Callable[[nn.Module, Inputs], Tensor]) -> None:
    """The loss, gradients and buffers of loss(module, inputs) on a device, against the model's own loss on the CPU."""
    module, inputs = spec.build(), spec.inputs(batch=4)
    runs = {
        "cpu": (copy.deepcopy(module), inputs, spec.loss),
        "exact": (copy.deepcopy(module).double(), to(inputs, "cpu", torch.float64), spec.loss),
        "ours": (copy.deepcopy(module).to(device), to(inputs, device), loss),
    }
    losses = {}
    for run, (m, i, f) in runs.items():
        losses[run] = f(m, i)
        losses[run].backward()
    assert_as_good(losses["ours"], losses["cpu"], losses["exact"], "loss")
    exact, cpu = (dict(runs[run][0].named_parameters()) for run in ("exact", "cpu"))
    # A gradient that is zero but for rounding (a bias before batch norm) is measured against the others.
    scale = 1e-3 * max(float(p.grad.norm()) for p in exact.values() if p.grad is not None)
    for key, p in runs["ours"][0].named_parameters():
        if exact[key].grad is None:
            assert p.grad is None
            continue
        assert p.grad is not None and p.grad.device.type == device.type
        assert_as_good(p.grad, cpu[key].grad, exact[key].grad, f"gradient of {key}", scale)
    for key, b in runs["ours"][0].named_buffers():  # running statistics
        if b.is_floating_point():
            c, e = runs["cpu"][0].get_buffer(key), runs["exact"][0].get_buffer(key)
            assert_as_good(b, c, e, f"buffer {key}")
