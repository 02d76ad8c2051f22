"""The whole `small` model on a GPU: bf16 with the Triton kernels is as close to fp32 as plain torch in bf16, packed, alone and decoding."""

import re
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

import pytest
import torch
import yaml

from model import weights
from model.cache import Cache
from model.config import ModelConfig
from model.decoding import TorchDecoder, decoder_for
from model.kernels.choice import choose
from model.kernels.logprob.op import token_logprobs
from model.transformer import Transformer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICE = "cuda"
CONFIG = Path(__file__).parents[2] / "conf/model/small.yaml"
LENGTHS = [700, 5, 1, 300, 131, 64]
DECODED = 40
SLACK, FLOOR = 1.5, 1e-4
"""Of plain torch's error in bf16, and a twentieth of a bf16 rounding for what it happens to hit exactly."""
FEW = 4096
"""Gradients of fewer elements are compared together: the error of a handful of numbers that nearly cancel is a matter of luck."""


def relative(got, want):
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


class Subject:
    """One model in one precision, with one implementation of the kernels."""

    def __init__(self, directory, kernels, dtype):
        self.model, self.kernels = weights.load(directory, dtype=dtype, device=torch.device(DEVICE)), kernels

    def train(self, tokens, cu):
        """Return hidden states, log-probs of the next tokens, MTP states and every gradient of the loss over all of them."""
        choose(self.kernels)
        hidden = self.model(tokens, cu)
        meaningful = torch.ones(len(tokens), dtype=torch.bool, device=DEVICE)
        meaningful[cu[1:] - 1] = False
        where = meaningful.nonzero().squeeze(1)
        logprobs = self.model.head(hidden.last[where], lambda h, weight: token_logprobs(h, weight, tokens[where + 1])[0])
        ahead = self.model.mtp_hidden(hidden, tokens, cu)[where]
        weight = torch.linspace(-1, 1, ahead.shape[1], device=DEVICE)
        loss = -logprobs.mean() + hidden.balance_loss + (ahead.float() * weight).sum(1).mean()
        trained = {name: p for name, p in self.model.named_parameters() if ".indexer." not in name}
        gradients = torch.autograd.grad(loss, list(trained.values()))
        choose(None)
        return {"hidden": hidden.last, "logprobs": logprobs, "mtp": ahead}, dict(zip(trained, gradients, strict=True))

    @torch.no_grad()
    def forward(self, tokens, cu):
        choose(self.kernels)
        logits = self.model.head(self.model(tokens, cu).last)
        choose(None)
        return logits

    @torch.inference_mode()
    def decode(self, samples, make_decoder):
        """Prefill all but the last tokens of each sample and decode those; returns their logits [DECODED, B, V]."""
        choose(self.kernels)
        dtype = self.model.embed.weight.dtype
        prompts = [sample[:-DECODED] for sample in samples]
        cache = Cache(self.model.config, rows=len(samples), capacity=max(map(len, samples)) + 1, device=DEVICE, dtype=dtype)
        cu = torch.tensor([0, *map(len, prompts)], device=DEVICE).cumsum(0)
        self.model.prefill(torch.cat(prompts), cu, cache)
        decoder = make_decoder(self.model, cache)
        steps = torch.stack([sample[-DECODED:] for sample in samples], 1).tolist()
        logits = torch.stack([decoder.step(step).clone() for step in steps])
        choose(None)
        return logits


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    """The truth (fp32, plain torch), plain torch in bf16, and the kernels in bf16, all with the same weights, which bf16 can hold."""
    values = yaml.safe_load(CONFIG.read_text())
    del values["defaults"]
    config = ModelConfig(**values)
    torch.manual_seed(0)
    model = Transformer(config)
    with torch.no_grad():  # what initialises to a constant is drawn at random
        for name, parameter in model.named_parameters():
            if name.endswith("_scale"):
                parameter.fill_(1.0)
            elif parameter.ndim == 1 or name.endswith("ape"):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            parameter.copy_(parameter.bfloat16())
    directory = tmp_path_factory.mktemp("small")
    weights.save(model, directory)
    return [
        Subject(directory, kernels, dtype)
        for kernels, dtype in (("reference", torch.float32), ("reference", torch.bfloat16), ("triton", torch.bfloat16))
    ]


@pytest.fixture(scope="module")
def row(subjects):
    torch.manual_seed(1)
    cu = torch.tensor([0, *LENGTHS], device=DEVICE).cumsum(0)
    return torch.randint(subjects[0].model.config.vocab_size, (sum(LENGTHS),), device=DEVICE), cu


@pytest.fixture(scope="module")
def trained(subjects, row):
    return [subject.train(*row) for subject in subjects]


@pytest.mark.parametrize("what", ["hidden", "logprobs", "mtp"])
def test_forward(trained, what):
    truth, plain, ours = (states[what] for states, _ in trained)
    print(f"{what}: triton {relative(ours, truth):.2e}, plain torch {relative(plain, truth):.2e}")
    assert relative(ours, truth) <= SLACK * relative(plain, truth) + FLOOR


def test_gradients(trained):
    """Layers' gradients of one name count together, by the mean square of their errors; of all the small ones the median counts."""
    truth = trained[0][1]
    errors = []
    for _, gradients in trained[1:]:
        found = {}
        for name, want in truth.items():
            group = "small" if want.numel() < FEW else re.sub(r"\d+", "N", name)
            found.setdefault(group, []).append(relative(gradients[name], want))
        small = {"small": median(found.pop("small"))}
        errors.append(small | {group: mean(error**2 for error in each) ** 0.5 for group, each in found.items()})
    plain, ours = errors
    for group, error in ours.items():
        print(f"{group}: triton {error:.2e}, plain torch {plain[group]:.2e}")
    worse = {group: (error, plain[group]) for group, error in ours.items() if error > SLACK * plain[group] + FLOOR}
    assert not worse


@pytest.fixture(scope="module")
def logits(subjects, row):
    return [subject.forward(*row) for subject in subjects]


def test_a_packed_row_equals_its_samples_alone(subjects, row, logits):
    tokens, cu = row
    truth, plain, packed = logits
    spans = [slice(a, b) for a, b in pairwise(cu.tolist())]
    alone = torch.cat([subjects[2].forward(tokens[span], torch.tensor([0, span.stop - span.start], device=DEVICE)) for span in spans])
    print(f"alone from packed {relative(alone, packed):.2e}, plain torch in bf16 from fp32 {relative(plain, truth):.2e}")
    assert relative(alone, packed) <= SLACK * relative(plain, truth) + FLOOR


@pytest.mark.parametrize("kind", ["chosen", "torch"])
def test_decoding_equals_the_forward_pass(subjects, row, logits, kind):
    """Both decoders: the one that sampling uses here, and `Transformer.decode`."""
    tokens, cu = row
    spans = [(a, b) for a, b in pairwise(cu.tolist()) if b - a > DECODED]
    make = {"chosen": lambda model, cache: decoder_for(model)(cache), "torch": TorchDecoder}[kind]
    decoded = subjects[2].decode([tokens[a:b] for a, b in spans], make)
    truth, plain = (torch.stack([each[b - DECODED : b] for _, b in spans], 1) for each in logits[:2])
    print(f"decoded from fp32 {relative(decoded, truth):.2e}, plain torch in bf16 from fp32 {relative(plain, truth):.2e}")
    assert relative(decoded, truth) <= SLACK * relative(plain, truth) + FLOOR
