"""TRL and transformers with the same model, pairs and prompts: bench.py compares with them.

Both get their best settings. TRL computes the reference's log-probabilities ahead, and keeps
activations unless --checkpointing. What lib/device.py:keep_memory sets for our process is not set
for theirs (docs/speed.md says what it would gain), and the libraries' caches have the sizes that
they have by default; how threads wait (lib/__init__.py) is the same for all. With adapters TRL uses
PEFT's, of the same rank, on all linear layers.
"""

import contextlib
import os
import tempfile
import warnings
from itertools import pairwise

from lib import CACHES, hub
from lib.device import clock
from lib.settings import usual_alpha

import torch
from torch.utils.data import SequentialSampler

ENVIRONMENT = {
    **dict.fromkeys(CACHES, "1024"),
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def load_model(c, sizes, dtype=torch.float32):
    """--init_from as transformers reads it, or a Llama of these sizes."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    warnings.simplefilter("ignore")  # of settings that TRL or transformers will rename
    torch.manual_seed(c.seed)
    if c.init_from:
        return AutoModelForCausalLM.from_pretrained(hub.model_path(c.init_from), dtype=dtype)
    llama = LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.d_model,
        intermediate_size=sizes.d_ff,
        num_hidden_layers=sizes.n_layer,
        num_attention_heads=sizes.n_head,
        num_key_value_heads=sizes.n_kv_head,
        tie_word_embeddings=sizes.tied_head,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(llama).to(dtype)


def trl_trainer(model, pairs, c, peft_config=None, **settings):
    """TRL's DPOTrainer on pairs of token ids, after its pass under the reference.

    trainer.reference_time: seconds of that pass. trainer.clock.times: when training began, and when
    each step ended. peft_config: of adapters. settings: of DPOConfig.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    device = torch.device(c.device)

    class TimedTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # token ids already

        def _precompute_ref_logps(self, *args):
            start = clock(device)
            dataset = super()._precompute_ref_logps(*args)
            self.reference_time = clock(device) - start
            return dataset

        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

    class StepClock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.times = [clock(device)]

        def on_step_end(self, *_, **__):
            self.times.append(clock(device))

    config = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=c.steps,
        max_length=None,
        lr_scheduler_type="constant",
        precompute_ref_log_probs=True,
        gradient_checkpointing=c.checkpointing,
        bf16=c.dtype == "bfloat16",
        fp16=c.dtype == "float16",
        use_cpu=c.device == "cpu",
        seed=c.seed,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        dataloader_pin_memory=c.device != "cpu",
        **settings,
    )
    vocabulary = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<eos>"
    )
    rows = [{"prompt_ids": p.x, "chosen_ids": p.y_w, "rejected_ids": p.y_l} for p in pairs]
    step_clock = StepClock()
    trainer = TimedTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[step_clock],
        peft_config=peft_config,
    )
    trainer.clock = step_clock
    return trainer


def trl_times(c, sizes, pairs, **settings):
    """(seconds of the pass under the reference, [seconds of each step]) of one epoch."""
    peft_config = None
    if c.lora_rank:
        from peft import LoraConfig

        scale = dict(r=c.lora_rank, lora_alpha=usual_alpha(c.lora_rank))
        peft_config = LoraConfig(**scale, target_modules="all-linear")
    trainer = trl_trainer(load_model(c, sizes), pairs, c, peft_config, **settings)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        trainer.train()
    times = trainer.clock.times
    return trainer.reference_time, [end - start for start, end in pairwise(times)]


@torch.no_grad()
def transformers_samples(c, sizes, prompts):
    """(answers of c.max_new_tokens to the prompts, seconds), all at once, weights in c.dtype."""
    device = torch.device(c.device)
    model = load_model(c, sizes, getattr(torch, c.dtype)).to(device).eval()
    longest = max(map(len, prompts))
    padded = [[0] * (longest - len(x)) + x for x in prompts]
    seen = [[0] * (longest - len(x)) + [1] * len(x) for x in prompts]
    inputs = torch.tensor(padded, device=device), torch.tensor(seen, device=device)

    def generate(rows, tokens):
        ids, mask = (x[:rows] for x in inputs)
        lengths = dict(max_new_tokens=tokens, min_new_tokens=tokens)
        settings = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)
        return model.generate(ids, attention_mask=mask, **lengths, **settings)[:, longest:]

    generate(1, 2)  # what happens only once
    start = clock(device)
    answers = generate(len(prompts), c.max_new_tokens)
    return answers.tolist(), clock(device) - start
