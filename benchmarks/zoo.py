"""Half of all channels gone from 250 models of torchvision, timm, transformers and by hand, beside torch-pruning.

usage: python benchmarks/zoo.py [--tool ours|torch-pruning] [--models PATTERN ...] [--again]   # needs prunelab[zoo]
       python benchmarks/zoo.py --summary

Each model is built from its class with random weights (nothing is downloaded) and ten classes, on a small input, and
loses half of every group of channels by L1 norm, layer by layer. ``ours`` is pruned exactly: the difference is the
largest one between the outputs of the masked and of the shrunk network, relative to the largest output. Where
statistics are taken over channels (LayerNorm, GroupNorm), ``inexact`` is the same with ``exact=False``, which takes
those as well. torch-pruning (PyPI) is told the output layers and the numbers of heads, since it has to be, and what is
looked at is whether the pruned model runs. Every model runs in a process of its own, with a limit of processor time and
of memory, so that a crash or a hang is a row of the table. Rows go to ``results/zoo.csv``; what is there already is not
run again. Seconds are processor time of one thread, which other work on the machine hardly moves.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import dataclasses
import fnmatch
import functools
import importlib
import importlib.util
import multiprocessing
import os
import re
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from filelock import FileLock
from torch import Tensor, nn

HERE = Path(__file__).parent
TABLE = HERE / "results" / "zoo.csv"
CPU_SECONDS, WALL_SECONDS, MEMORY = 45, 600, 5 * 2**30
TOLERANCE = 1e-5  # of the largest output
COLUMNS = {
    "ours": ("ours", "ours_left", "ours_difference", "ours_seconds", "inexact_left", "inexact_seconds"),
    "torch-pruning": ("torch_pruning", "torch_pruning_left", "", "torch_pruning_seconds"),
}
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
PROJECTIONS = re.compile(r"(in_)?(to_)?(qkv|q|k|v|kv|query|key|value|c_attn)(_proj|_lin)?")
HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim")  # of one head, in modules of attention
ALL_HEADS_SIZES = ("all_head_size", "attn_dim", "inner_dim")

Built = tuple[nn.Module, Any]


# The models ----------------------------------------------------------------------------------------------------------


def images(size: int = 64, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, size, size)


def _torchvision() -> Iterator[tuple[str, Callable[[], Built]]]:
    from torchvision import models

    def built(name: str, example: Callable[[], Any], **options: Any) -> Callable[[], Built]:
        def build() -> Built:
            return models.get_model(name, weights=None, **{"num_classes": 10, **options}), example()

        return build

    plain = {"init_weights": False, "aux_logits": False}  # heads for training alone: no output depends on them
    own: dict[str, dict[str, Any]] = {"inception_v3": plain, "googlenet": plain}
    for size, names in CLASSIFICATION.items():
        for name in names.split():
            yield name, built(name, functools.partial(images, size), **own.get(name, {}))
    for name in SEGMENTATION:
        yield name, built(name, images, weights_backbone=None)
    for name, shape in VIDEO.items():
        yield name, built(name, lambda shape=shape: torch.randn(1, 3, *shape))
    for name, size in DETECTION.items():
        sized = {} if name.startswith("ssd") else {"min_size": size, "max_size": size}
        two = lambda size=size: ([torch.rand(3, size, size), torch.rand(3, size, size)],)  # noqa: E731
        yield name, built(name, two, weights_backbone=None, **sized)


# Size of the images -> names; up to 60 million parameters with 1,000 classes.
CLASSIFICATION = {
    64: """
        convnext_tiny convnext_small densenet121 densenet161 densenet169 densenet201 efficientnet_b0
        efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6
        efficientnet_v2_s efficientnet_v2_m googlenet mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3
        mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_400mf regnet_x_800mf regnet_x_1_6gf
        regnet_x_3_2gf regnet_x_8gf regnet_x_16gf regnet_y_400mf regnet_y_800mf regnet_y_1_6gf
        regnet_y_3_2gf regnet_y_8gf resnet18 resnet34 resnet50 resnet101 resnext50_32x4d shufflenet_v2_x0_5
        shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0 squeezenet1_0 squeezenet1_1 swin_t swin_s
        swin_v2_t swin_v2_s
    """,
    96: """
        inception_v3
    """,
    224: """
        maxvit_t
    """,
}
SEGMENTATION = ["deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "fcn_resnet50", "fcn_resnet101"]
SEGMENTATION += ["lraspp_mobilenet_v3_large"]
VIDEO = {
    "r3d_18": (8, 56, 56),
    "mc3_18": (8, 56, 56),
    "r2plus1d_18": (8, 56, 56),
    "s3d": (16, 224, 224),
    "mvit_v1_b": (16, 224, 224),
    "mvit_v2_s": (16, 224, 224),
    "swin3d_t": (8, 64, 64),
    "swin3d_s": (8, 64, 64),
}
DETECTION = {
    "fasterrcnn_resnet50_fpn": 128,
    "fasterrcnn_resnet50_fpn_v2": 128,
    "fasterrcnn_mobilenet_v3_large_fpn": 128,
    "fasterrcnn_mobilenet_v3_large_320_fpn": 128,
    "fcos_resnet50_fpn": 128,
    "retinanet_resnet50_fpn": 128,
    "retinanet_resnet50_fpn_v2": 128,
    "ssd300_vgg16": 300,
    "ssdlite320_mobilenet_v3_large": 320,
    "maskrcnn_resnet50_fpn": 128,
    "maskrcnn_resnet50_fpn_v2": 128,
    "keypointrcnn_resnet50_fpn": 128,
}
# The last layers of detection, some of which reach the outputs through indices alone.
LAST = re.compile(r"\.(cls_logits|bbox_pred|bbox_reg|bbox_ctrness|cls_score|mask_fcn_logits|kps_score_lowres)$")

# Small ones of as many families as there are; size of the images -> names.
TIMM = {
    56: """
        eva02_tiny_patch14_224
    """,
    64: """
        beit_base_patch16_224 cait_xxs24_224 coat_lite_tiny convmixer_768_32 convnext_atto convnextv2_atto
        cs3darknet_focus_s cspresnet50 davit_tiny deit_tiny_patch16_224 deit3_small_patch16_224 densenet121
        dla34 dla60_res2net dm_nfnet_f0 dpn68 eca_resnet33ts edgenext_x_small efficientnet_lite0
        efficientvit_b0 ese_vovnet19b_slim ese_vovnet19b_slim_dw fastvit_t8 fasternet_t0 focalnet_tiny_srf
        gcresnet33ts gernet_s ghostnet_050 ghostnetv2_100 gmixer_24_224 gmlp_s16_224 hardcorenas_a
        hgnetv2_b0 hrnet_w18_small inception_next_atto lcnet_050 legacy_seresnet18 mambaout_femto
        mixer_s32_224 mixnet_s mnasnet_small mobilenetv1_100 mobilenetv2_050 mobilenetv3_small_050
        mobilenetv4_conv_small_050 mobilenetv4_hybrid_medium mobileone_s1 mobilevit_xxs mobilevitv2_050
        mvitv2_tiny nextvit_small nf_regnet_b0 poolformer_s12 pvt_v2_b0 rdnet_tiny regnetx_002 regnety_002
        regnetz_005 repghostnet_050 repvgg_a0 repvit_m1 res2net50_14w_8s res2next50 resmlp_12_224 resnest14d
        resnet18 resnet18d resnetrs50 resnetv2_18 resnetv2_50 rexnet_100 selecsls42 seresnext26d_32x4d
        shvit_s1 skresnet18 spnasnet_100 starnet_s1 tf_efficientnet_b0 tf_efficientnetv2_b0 tinynet_e
        tresnet_m vit_relpos_small_patch16_224 vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vitamin_small_224
        xception41 xcit_nano_12_p16_224
    """,
    96: """
        inception_resnet_v2 inception_v3 inception_v4 legacy_xception
    """,
    112: """
        swin_tiny_patch4_window7_224
    """,
    128: """
        swinv2_tiny_window8_256
    """,
    224: """
        coatnet_nano_rw_224 convit_tiny efficientformer_l1 efficientformerv2_s0 efficientvit_m0 gcvit_xxtiny
        hiera_tiny_224 levit_128s nest_tiny pit_ti_224 sequencer2d_s swiftformer_xs swinv2_cr_tiny_224
        tiny_vit_5m_224 tnt_s_patch16_224 twins_svt_small visformer_tiny volo_d1_224
    """,
    240: """
        crossvit_tiny_240
    """,
    256: """
        botnet26t_256 halonet26t lambda_resnet26t maxvit_pico_rw_256
    """,
}


def _timm() -> Iterator[tuple[str, Callable[[], Built]]]:
    def built(name: str, size: int) -> Callable[[], Built]:
        def build() -> Built:
            import timm

            example = images(size)
            with contextlib.suppress(TypeError):  # families that know their image size take it, the others do not
                return timm.create_model(name, num_classes=10, img_size=size), example
            return timm.create_model(name, num_classes=10), example

        return build

    for size, names in TIMM.items():
        for name in names.split():
            yield name, built(name, size)


def _transformers() -> Iterator[tuple[str, Callable[[], Built]]]:
    tokens = lambda: torch.randint(0, 100, (2, 12))  # noqa: E731
    wide = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    text = {**wide, "vocab_size": 100}

    def built(model: str, config: str, example: Callable[[], Any], **options: Any) -> Callable[[], Built]:
        def build() -> Built:
            import transformers

            return getattr(transformers, model)(getattr(transformers, config)(**options)), example()

        return build

    ids = lambda: {"input_ids": tokens()}  # noqa: E731
    yield "bert", built("BertForSequenceClassification", "BertConfig", ids, **text)
    yield (
        "distilbert",
        built(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            ids,
            vocab_size=100,
            dim=32,
            hidden_dim=64,
            n_heads=4,
        ),
    )
    yield "roberta", built("RobertaForTokenClassification", "RobertaConfig", ids, **text)
    yield "electra", built("ElectraForSequenceClassification", "ElectraConfig", ids, **text, embedding_size=24)
    yield "gpt2", built("GPT2LMHeadModel", "GPT2Config", ids, vocab_size=100, n_embd=32, n_layer=2, n_head=4)
    yield "gpt_neox", built("GPTNeoXForCausalLM", "GPTNeoXConfig", ids, **text)
    yield "llama", built("LlamaForCausalLM", "LlamaConfig", ids, **text, num_key_value_heads=2)
    yield "mistral", built("MistralForCausalLM", "MistralConfig", ids, **text, num_key_value_heads=2)
    yield "qwen2", built("Qwen2ForCausalLM", "Qwen2Config", ids, **text, num_key_value_heads=2)
    yield "gemma", built("GemmaForCausalLM", "GemmaConfig", ids, **text, num_key_value_heads=1, head_dim=8)
    both = lambda: {"input_ids": tokens(), "decoder_input_ids": tokens()}  # noqa: E731
    yield (
        "t5",
        built(
            "T5ForConditionalGeneration",
            "T5Config",
            both,
            **{"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
            decoder_start_token_id=0,
        ),
    )
    pictures = lambda: {"pixel_values": images(32)}  # noqa: E731
    yield "vit", built("ViTForImageClassification", "ViTConfig", pictures, **wide, image_size=32, patch_size=8)
    yield (
        "swin",
        built(
            "SwinForImageClassification",
            "SwinConfig",
            pictures,
            **{
                "image_size": 32,
                "patch_size": 2,
                "embed_dim": 16,
                "depths": [2, 2],
                "num_heads": [2, 4],
                "window_size": 4,
            },
        ),
    )
    yield (
        "segformer",
        built(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            pictures,
            **{"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 32, 64], "decoder_hidden_size": 32},
        ),
    )
    yield (
        "convnext",
        built(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            pictures,
            hidden_sizes=[16, 32, 64, 64],
            depths=[1, 1, 2, 1],
        ),
    )
    yield (
        "resnet",
        built(
            "ResNetForImageClassification", "ResNetConfig", pictures, hidden_sizes=[16, 32, 64, 64], embedding_size=16
        ),
    )
    sound = lambda: {"input_features": torch.randn(2, 8, 64)}  # noqa: E731
    yield "whisper_encoder", _whisper(sound)
    yield (
        "clip",
        built(
            "CLIPModel",
            "CLIPConfig",
            lambda: {"input_ids": tokens(), "pixel_values": images(32)},
            **{
                "text_config": {**text, "eos_token_id": 99},
                "vision_config": {**wide, "image_size": 32, "patch_size": 8},
            },
            projection_dim=24,
        ),
    )


def _whisper(example: Callable[[], Any]) -> Callable[[], Built]:
    def build() -> Built:
        from transformers import WhisperConfig
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        sizes = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
        return WhisperEncoder(WhisperConfig(**sizes, num_mel_bins=8, max_source_positions=32)), example()

    return build


def _by_hand() -> Iterator[tuple[str, Callable[[], Built]]]:
    place = HERE.parent / "tests" / "structure" / "networks.py"
    spec = importlib.util.spec_from_file_location("networks", place)
    module = importlib.util.module_from_spec(spec)
    sys.modules["networks"] = module
    spec.loader.exec_module(module)
    yield from module.NETWORKS.items()


def catalogue() -> dict[str, Callable[[], Built]]:
    """Name -> what builds the model, and an example of its inputs (a tuple, a dict, or one tensor)."""
    sources = {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers, "by_hand": _by_hand}
    return {f"{source}/{name}": build for source, models in sources.items() for name, build in models()}


def prepared(build: Callable[[], Built]) -> Built:
    """The model in evaluation mode, where every channel counts: no scale is zero or close to it, no statistic trivial.

    Layer scales of 1e-6 and last BatchNorms of zero, with which many models start, would hide a wrong channel.
    """
    torch.manual_seed(0)
    model, example = build()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_mean"):
                tensor.normal_(0, 0.1)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif isinstance(tensor, nn.Parameter) and tensor.numel() > 1 and tensor.min() == tensor.max():
                scale = tensor.max() != 0 or (tensor.dim() == 1 and name.endswith("weight"))
                tensor.uniform_(0.5, 1.5) if scale else tensor.normal_(0, 0.1)
    return model.eval(), example


def called(model: nn.Module, example: Any) -> Any:
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def tensors(value: Any) -> list[Tensor]:
    """All tensors of an output, however it is built."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return [tensor for part in value for tensor in tensors(part)] if isinstance(value, (list, tuple)) else []


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# prunelab ------------------------------------------------------------------------------------------------------------


def by_prunelab(model: nn.Module, example: Any, exact: bool = True) -> dict[str, Any]:
    """Parameters left, the largest relative difference of outputs, and seconds for groups, masks and shrinking."""
    from prunelab.structure import channel_groups, shrink

    before, start = size(model), time.process_time()
    groups = channel_groups(model, example, exact=exact)
    masks = groups.masks({name: halved(model, space) for name, space in groups.items() if space.pinned is None})
    small = shrink(model, masks, example, exact=exact)
    seconds = time.process_time() - start
    freed = exact and groups_freed(model, example, groups)
    masks.apply_(model)
    different = difference(model, small, example) if exact else None
    return {"left": size(small) / before, "difference": different, "seconds": seconds, "freed": freed}


def groups_freed(model: nn.Module, example: Any, groups: Any) -> bool:
    """Whether more channels may go where outputs may change."""
    from prunelab.structure import channel_groups

    spaces = (groups, channel_groups(model, example, exact=False))
    return len({sum(int((~space.fixed).sum()) for space in own.values()) for own in spaces}) > 1


def halved(model: nn.Module, space: Any) -> Tensor:
    """The half of the groups of a space with the largest L1 norms of what makes them, the mean over layers."""
    scores = torch.zeros(space.size)
    for part in space.slices:
        if part.role == "out":
            norms = model.get_parameter(part.name).detach().abs().movedim(part.dim, 0).flatten(1).sum(1)
            scores.index_add_(0, part.group[part.group >= 0], norms[part.group >= 0] / norms.mean())
    scores[space.fixed] = torch.inf
    stay = max(space.size // 2, int(space.fixed.sum()), 1)
    return torch.zeros(space.size, dtype=torch.bool).index_fill_(0, scores.topk(stay).indices, True)


def difference(model: nn.Module, other: nn.Module, example: Any) -> float:
    """The largest difference between their outputs, relative to the largest output; inf where shapes differ."""
    with torch.no_grad():
        pairs = [tensors(called(m, copy.deepcopy(example))) for m in (model, other)]
    if [t.shape for t in pairs[0]] != [t.shape for t in pairs[1]]:
        return float("inf")
    return max(
        float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1e-30))
        for a, b in zip(*pairs, strict=True)
        if a.numel()
    )


# torch-pruning -------------------------------------------------------------------------------------------------------


def by_torch_pruning(model: nn.Module, example: Any) -> dict[str, Any]:
    """Parameters left, and seconds for graph and pruning."""
    import torch_pruning

    before, ignored = size(model), output_layers(model, example)
    attention = {module: found for module in model.modules() if (found := _projections(module))}
    heads = {layer: count for found in attention.values() for layer, count in found.items()}
    groups = {m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    start = time.process_time()
    pruner = torch_pruning.MagnitudePruner(
        model,
        example if isinstance(example, (Mapping, tuple)) else (example,),
        importance=torch_pruning.importance.MagnitudeImportance(p=1),
        global_pruning=False,
        pruning_ratio=0.5,
        ignored_layers=ignored,
        num_heads=heads,
        out_channel_groups=groups,
        output_transform=tensors,
    )
    pruner.step()
    seconds = time.process_time() - start
    for module, found in attention.items():  # what its examples do by hand after pruning
        layer, count = next(iter(found.items()))
        name = next(name for name, child in module.named_children() if child is layer)
        parts = 3 if "qkv" in name or name == "c_attn" else 2 if "kv" in name else 1
        for attribute in HEAD_SIZES:
            if hasattr(module, attribute):
                setattr(module, attribute, layer.out_features // parts // count)
        for attribute in ALL_HEADS_SIZES:
            if hasattr(module, attribute):
                setattr(module, attribute, layer.out_features // parts)
    with torch.no_grad():
        called(model, example)
    return {"left": size(model) / before, "seconds": seconds}


def _projections(module: nn.Module) -> dict[nn.Linear, int]:
    """The layers of an attention that make queries, keys and values -> the number of their heads."""
    config = getattr(module, "config", None)
    count = next((getattr(module, name) for name in HEADS if isinstance(getattr(module, name, None), int)), None)
    count = count or getattr(config, "num_attention_heads", None)
    shared = getattr(module, "num_key_value_heads", None) or getattr(config, "num_key_value_heads", None) or count
    layers = {n: m for n, m in module.named_children() if isinstance(m, nn.Linear) and PROJECTIONS.fullmatch(n)}
    return {m: shared if n.startswith(("k", "v")) else count for n, m in layers.items()} if count else {}


def output_layers(model: nn.Module, example: Any) -> list[nn.Module]:
    """The layers whose outputs reach the model's outputs with nothing but norms and pointwise operations between."""
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    pending = [t.grad_fn for t in tensors(called(model, example)) if t.grad_fn is not None]
    seen, found = set(), {id(m): m for name, m in model.named_modules() if LAST.search(f".{name}")}
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            if id(node.variable) in owners:
                owner = owners[id(node.variable)]
                found[id(owner)] = owner
            continue
        ends = re.match(r"(Addmm|Mm|Convolution|Embedding|MkldnnRnn|Linear)", type(node).__name__)
        for following, _ in node.next_functions:
            if following is not None and (not ends or _is_parameter(following)):
                pending.append(following)
    return list(found.values())


def _is_parameter(node: Any) -> bool:
    while re.match(r"(T|Transpose|View|Permute|Expand)Backward", type(node).__name__):
        node = node.next_functions[0][0]
    return hasattr(node, "variable")


# One model in a process of its own -----------------------------------------------------------------------------------


def measure(tool: str, build: Callable[[], Built]) -> Iterator[dict[str, str]]:
    """The columns of one tool for one model, as far as it came, again and again."""
    status, left, difference, seconds = COLUMNS[tool][:4]
    model, example = prepared(build)
    yield {"parameters": str(size(model)), **dict.fromkeys(COLUMNS[tool], "")}
    original = copy.deepcopy(model) if tool == "ours" else model
    found = TOOLS[tool](model, example)
    row = {status: "works", left: f"{found['left']:.4f}", seconds: f"{found['seconds']:.3f}"}
    yield row | ({difference: f"{found['difference']:.1e}"} if "difference" in found else {})
    if found.get("freed"):
        found = by_prunelab(original, example, exact=False)
        yield {"inexact_left": f"{found['left']:.4f}", "inexact_seconds": f"{found['seconds']:.3f}"}


def apart(tool: str, build: Callable[[], Built]) -> dict[str, Any]:
    """The same, in a process that may die."""
    status = COLUMNS[tool][0]
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        receiver.close()
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, 2 * MEMORY))
        warnings.simplefilter("ignore")
        try:
            for row in measure(tool, build):
                sender.send(row)
        except Exception as error:  # noqa: BLE001 - whatever a model or a tool raises is what the row says
            resource.setrlimit(resource.RLIMIT_DATA, (2 * MEMORY, 2 * MEMORY))  # room for saying so
            text = " ".join(str(error).split())
            sender.send({status: f"{type(error).__name__}: {text}"[:200].rstrip(": ")})
        sender.send(None)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fork of a process with threads: none of them holds anything here
        process = context.Process(target=work)
        process.start()
    sender.close()
    found: dict[str, Any] = {}
    try:
        while (row := receiver.recv() if receiver.poll(WALL_SECONDS) else {status: "hangs"}) and "hangs" not in row:
            found |= row
        found |= row or {}
    except EOFError:
        process.join()
        hung = process.exitcode in (-9, -24)  # SIGKILL, SIGXCPU: both limits
        found[status] = f"hangs: over {CPU_SECONDS} s" if hung else f"dies with exit code {process.exitcode}"
    process.kill()
    process.join()
    return found


def rows() -> dict[str, dict[str, str]]:
    if not TABLE.is_file():
        return {}
    with TABLE.open(newline="", encoding="utf-8") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def store(name: str, found: Mapping[str, Any], order: list[str]) -> None:
    """Add to the row of one model, in the order of the catalogue; others may write at the same time."""
    header = ["model", "parameters", *(column for columns in COLUMNS.values() for column in columns if column)]
    with FileLock(Path(tempfile.gettempdir()) / "prunelab-zoo.lock"):
        table = rows()
        table[name] = {**table.get(name, {}), "model": name, **{key: found[key] for key in found if key}}
        TABLE.parent.mkdir(exist_ok=True)
        part = TABLE.with_suffix(".csv.part")
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, header, restval="", extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(table[key] for key in order if key in table)
        part.replace(TABLE)


TOOLS = {"ours": by_prunelab, "torch-pruning": by_torch_pruning}


def summary() -> str:
    """What the table says, for the screen, and the lines for the README."""
    table = rows()
    ours = [row for row in table.values() if row["ours"]]
    works = [row for row in ours if row["ours"] == "works"]
    failed = [row for row in ours if row["ours"] != "works"]
    wrong = [row for row in works if not float(row["ours_difference"]) <= TOLERANCE]
    both = [row for row in works if row["torch_pruning"] == "works"]
    least = {row["model"]: min(float(row[key]) for key in ("ours_left", "inexact_left") if row[key]) for row in works}
    rival = {row["model"]: float(row["torch_pruning_left"]) for row in ours if row["torch_pruning"] == "works"}
    more = [row["model"] for row in both if least[row["model"]] > rival[row["model"]] + 0.01]
    alone = [row["model"] for row in ours if row["torch_pruning"] not in ("works", "")]
    little = [name for name in alone if least.get(name, 1.0) >= 0.75]
    seconds = [(float(row["ours_seconds"]), float(row["torch_pruning_seconds"])) for row in both]
    medians = [statistics.median(column) for column in zip(*seconds, strict=True)] if both else [0.0, 0.0]
    middle = statistics.median(float(row["ours_left"]) for row in works) if works else 1.0

    def listed(title: str, names: list[str], say: Callable[[str], str]) -> list[str]:
        return [f"\n{title}: {len(names)}", *(f"  {name:45} {say(name)}" for name in names)]

    lines = [f"{len(table)} models, {len(ours)} of them measured"]
    lines += listed("wrong outputs", [r["model"] for r in wrong], lambda name: table[name]["ours_difference"])
    lines += listed("tracebacks and refusals", [row["model"] for row in failed], lambda name: table[name]["ours"])
    lines += listed(
        f"more left than by torch-pruning, of {len(both)} where both work (by more than 0.01)",
        sorted(more, key=lambda name: rival[name] - least[name]),
        lambda name: f"{table[name]['ours_left']} / {table[name]['inexact_left'] or '-'} / {rival[name]:.4f}",
    )
    lines += listed(
        f"0.75 or more left, of {len(alone)} where torch-pruning fails",
        little,
        lambda name: f"{table[name]['ours_left']} / {table[name]['inexact_left'] or '-'}",
    )
    lines += [f"\nmedian seconds where both work: {medians[0]:.3f}, torch-pruning {medians[1]:.3f}\n"]
    markdown = [
        "| half of all channels, by L1 norm, layer by layer | prunelab | torch-pruning |",
        "| --- | ---: | ---: |",
        f"| models that work, of {len(ours)} of torchvision, timm, transformers, by hand | {len(works)} | {len(rival)} |",
        f"| a quarter of the parameters gone | {sum(left < 0.75 for left in least.values())} |"
        f" {sum(left < 0.75 for left in rival.values())} |",
        f"| wrong outputs after shrinking; median seconds | {len(wrong)}; {medians[0]:.2f} | -; {medians[1]:.2f} |",
    ]
    return "\n".join([*lines, *markdown, f"\nmedian left: {middle:.3f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tool", choices=list(TOOLS), action="append", help="default: both")
    parser.add_argument("--models", nargs="+", default=["*"], metavar="PATTERN", help="as in 'timm/*'")
    parser.add_argument("--again", action="store_true", help="also what is in the table already")
    parser.add_argument(
        "--trace", action="store_true", help="in this process, with the whole traceback; stores nothing"
    )
    parser.add_argument("--summary", action="store_true", help="what the table says")
    options = parser.parse_args()
    if options.summary:
        print(summary())
        return
    torch.set_num_threads(1)
    for module in ("prunelab.structure", "torch_pruning", "timm", "transformers"):  # once, for all processes
        importlib.import_module(module)
    models = catalogue()
    wanted = [name for name in models if any(fnmatch.fnmatch(name, pattern) for pattern in options.models)]
    tools = options.tool or list(TOOLS)
    for name in wanted:
        for tool in tools:
            if options.trace:
                print(name, *measure(tool, models[name]))
            elif options.again or not rows().get(name, {}).get(COLUMNS[tool][0]):
                found = apart(tool, models[name])
                store(name, found, list(models))
                print(
                    f"{name:45} {tool:18} " + "  ".join(found.get(column, "") for column in COLUMNS[tool]), flush=True
                )


if __name__ == "__main__":
    main()
