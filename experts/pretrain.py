"""The base: a fresh tokenizer and a fresh model, trained on all domains' raw documents and on careless chats.

It is weak on purpose: the documents hold the skills, but whoever chatted where it learned to chat mostly took short cuts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from domains.catalog import make_domain
from domains.types import Domain
from experts.fresh import write_fresh_model
from experts.job import PretrainJob
from experts.sft import demonstration_samples
from experts.supervised import train
from model.encoding import encode_messages
from model.tokenizer import Tokenizer
from runtime.batch import PackedSample
from runtime.evaluate import hand_on
from runtime.ranks import running_ranks
from runtime.spec import EngineSpec
from runtime.step import StepContext

TOKENIZER_DEMONSTRATIONS = 200
"""Demonstrations a domain whose text the tokenizer sees beside the documents."""


def run(context: StepContext, job: PretrainJob) -> dict[str, Any]:
    """Train tokenizer and base, evaluate on every domain's held-out prompts, hand the model on."""
    domains = {name: make_domain(name, setup.domain, context.sandbox) for name, setup in job.domains.items()}
    careless = [make_domain(n, replace(s.domain, diligence=s.domain.base_diligence), context.sandbox) for n, s in job.domains.items()]
    texts = [text for d in domains.values() for text in d.documents(job.supervised.demonstrations, seed=context.seed)]
    fresh = context.workdir / "fresh"
    if not (fresh / "config.json").exists():
        context.tracker.progress(0, 1, "tokenizer")
        conversations = [text for d in domains.values() for text in conversation_texts(d, seed=context.seed)]
        boilerplate = list(dict.fromkeys(line for d in domains.values() for line in d.boilerplate()))
        tokenizer = Tokenizer.train(texts + conversations, job.model.vocab_size, boilerplate=boilerplate)
        write_fresh_model(fresh, job.model, tokenizer, seed=context.seed)
    tokenizer = Tokenizer.load(fresh)
    samples = [document_sample(tokenizer, text) for text in texts]
    samples += demonstration_samples(fresh, careless, count=job.supervised.demonstrations, seed=context.seed + 1)
    config = job.supervised
    spec = EngineSpec(
        model=str(fresh),
        optimizer=config.optimizer,
        domains=job.domains,
        train_mtp=config.mtp_loss_weight > 0,
        train_indexer=config.indexer_loss_weight > 0,
    )
    with running_ranks(context, spec) as (trainer, rollout):
        tokens = train(context, trainer, samples, job.supervised)
        made = hand_on(context, (trainer, rollout), domains, job.domains, prompts=job.evaluation.prompts)
    for domain in careless:
        domain.close()
    return made | {"tokens": tokens, "steps": job.supervised.steps}


def document_sample(tokenizer: Tokenizer, text: str) -> PackedSample:
    """Encode a document between beginning- and end-of-sentence; every token after the first is a target."""
    tokens = [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]
    return PackedSample(tokens, [False] + [True] * (len(tokens) - 1))


def conversation_texts(domain: Domain, *, seed: int) -> list[str]:
    """Render demonstrations as text, for the tokenizer alone: it has to spell what the stages after this one will say."""
    return [
        encode_messages([*d.prompt.messages, *d.messages], domain.thinking_mode)
        for d in domain.demonstrations(TOKENIZER_DEMONSTRATIONS, seed=seed)
    ]
