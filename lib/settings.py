"""Every flag of train.py and eval.py, declared once: help, bounds and default."""

from dataclasses import dataclass
from typing import ClassVar

from lib.chat import TEMPLATES
from lib.flags import flag
from lib.losses import NAMES

from safedpo import PAIR_CHOICES

MODELS = ("reference", "policy")
JUDGES = ("reward_model", "cost_model", "scores")
# what figures depend on, beside the run and the data
EVAL_FLAGS = (
    "seed", "max_length", "eval_prompts", "temperature", "top_k", "top_p", "max_new_tokens",
    "sample_length",
)  # fmt: skip
SHOWN = (*JUDGES, "json", "plot", "verbose")  # flags of eval.py's table


@dataclass(frozen=True)
class Settings:
    """What an evaluation depends on beside the run. eval.py takes the run's own if left out."""

    seed: int = flag(0, "seed of training and of sampling", least=0)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, …")
    dtype: str = flag(
        "auto",
        "matrix products in this type; in training weights stay float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    max_length: int = flag(512, "tokens of a prompt and one answer; what is longer is cut", least=2)
    eval_prompts: int = flag(600, "test prompts to sample an answer for", above=0)
    temperature: float = flag(
        1.0, "temperature of sampling; 0 takes the most probable token", least=0
    )
    top_k: int = flag(0, "sample only from the k most probable tokens; 0: from all", least=0)
    top_p: float = flag(
        1.0, "sample from the smallest set of tokens with this probability", above=0, most=1
    )
    max_new_tokens: int = flag(256, "tokens after which a sampled answer is cut off", above=0)
    sample_length: int = flag(
        0, "most tokens of a prompt and its sampled answer together; 0: no bound", least=0
    )
    verbose: bool = flag(False, "print every figure, not only the short table")


@dataclass(frozen=True)
class TrainConfig(Settings):
    data: str = flag(
        "toy",
        "toy, a file, a folder with train and test files, or OWNER/NAME on the Hugging Face hub",
        path=True,
    )
    init_from: str = flag(
        "",
        "start from this: a checkpoint of ours, a Hugging Face model folder, or OWNER/NAME on the "
        "hub",
        path=True,
    )
    prompt_template: str = flag(
        None,
        f"a text with {{prompt}} in it, or {', '.join(TEMPLATES)}; "
        "left out: plain, or the model's own",
        kind=str,
    )
    date: str = flag(
        None, "the day that a chat template may name, as 2026-01-31; left out: today", kind=str
    )
    pairs: str = flag("safedpo", "how pairs are ordered", choices=tuple(PAIR_CHOICES))
    beta: float = flag(2.0, "β of the loss", above=0)
    delta: float = flag(
        None,
        "Δ of the loss: a pair that has gained Δ/β nats pulls at half strength; left out: 5 with "
        "safedpo, noswap; 0 with others",
        kind=float,
        least=0,
    )
    loss: str = flag("logistic", "the g of SafeDAA: what a pair's logit costs", choices=NAMES)
    epsilon: float = flag(
        0.1, "share of pairs that --loss robust takes for the wrong way round", least=0, most=0.49
    )
    anchor: float = flag(
        0.0,
        "adds this times the winner's −log π, in nats, to a pair's loss; it falls to 0, as "
        "(1 − t)² over the share t of the steps that is done",
        least=0,
    )
    label_noise: float = flag(
        0.0, "flip each safety label of the training pairs with this probability", least=0, most=1
    )
    out_dir: str = flag(
        "", "folder of the run; left out: runs/ and a name made of the flags", path=True
    )
    resume: bool = flag(False, "go on with the run in the folder")
    sample_every: int = flag(
        0,
        "print answers to three test prompts after every so many steps of each stage; 0: never",
        least=0,
    )
    log: str = flag(
        "none",
        "also write each step's numbers for this tracker, into the run's folder",
        choices=("none", "tensorboard", "wandb"),
    )
    lora_rank: int = flag(
        0,
        "train low-rank adapters (LoRA) of this rank on a frozen model; 0: the whole model",
        least=0,
        most=2**16,
    )
    lora_alpha: float = flag(
        None,
        "α of LoRA: their products are scaled by α / rank; left out: twice the rank",
        kind=float,
        above=0,
    )
    base_dtype: str = flag(
        "auto",
        "type in which the frozen model is held; auto: bfloat16 where its files are, else float32",
        choices=("auto", "float32", "bfloat16"),
    )
    compile: bool = flag(None, "torch.compile; left out: on CUDA only", kind=bool)
    checkpointing: bool = flag(
        False,
        "compute a block's inner values again in the backward pass: less memory, up to a third "
        "slower",
    )
    fsdp: bool = flag(
        False, "under torchrun: shard the model over the processes instead of a copy on each"
    )
    vocab_size: int = flag(4096, "of the tokenizer, at most", least=257, most=2**24)
    n_layer: int = flag(2, "layers", above=0, most=1024)
    n_head: int = flag(4, "attention heads", above=0, most=2**16)
    n_kv_head: int = flag(2, "heads of keys and values", above=0, most=2**16)
    d_model: int = flag(128, "width", above=0, most=2**20)
    d_ff: int = flag(256, "width of the SwiGLU", above=0, most=2**22)
    sft_epochs: int = flag(
        None,
        "passes of SFT, which makes the reference; left out: 1 from nothing, 0 with --init_from",
        kind=int,
        least=0,
    )
    sft_lr: float = flag(3e-3, "peak learning rate of SFT", above=0)
    sft_batch_size: int = flag(
        8, "pairs in a step of SFT, which learns both answers of each", above=0
    )
    epochs: int = flag(
        1, "passes of SafeDPO; 0: SFT only, and the policy is the reference", least=0
    )
    lr: float = flag(4e-4, "peak learning rate of SafeDPO", above=0)
    batch_size: int = flag(64, "pairs in a step of SafeDPO", above=0)
    micro_batch_size: int = flag(16, "pairs in a forward pass; more where they are short", above=0)
    warmup: float = flag(
        0.3,
        "share of the steps in which the learning rate rises; then a cosine to 0",
        least=0,
        most=1,
    )
    weight_decay: float = flag(0.05, "weight decay of AdamW, on matrices", least=0)
    beta2: float = flag(
        0.99, "AdamW's second beta, the decay of the squared gradients' mean", above=0, most=1
    )
    grad_clip: float = flag(1.0, "norm to which gradients are clipped", above=0)
    save_every: int = flag(
        100, "steps between two saves of the training state, and 15 minutes at most", above=0
    )


@dataclass(frozen=True)
class EvalConfig(Settings):
    runs: tuple = flag((), "folders that train.py wrote", many=True)
    data: str = flag(
        "",
        "judge on this data instead of the run's own, named as for train.py; prompts that are said "
        "to be benign or not are enough",
        path=True,
    )
    split: str = flag("test", "split to draw prompts from: train, test, and in the village unseen")
    prompt: str = flag(
        "",
        "show some answers of reference and policy to this prompt, a text or messages as JSON, and "
        "nothing else",
    )
    chat: bool = flag(False, "talk with reference and policy in the terminal, and do nothing else")
    reward_model: str = flag(
        "",
        "score the answers' helpfulness with this model: a Hugging Face folder with a score head, "
        "or OWNER/NAME on the hub",
        path=True,
    )
    cost_model: str = flag(
        "",
        "score the answers' harm with this model; an answer with cost ≤ 0 is harmless",
        path=True,
    )
    judge_template: str = flag(
        "beaver",
        "what stands around a prompt for these two models: a text with {prompt} in it, or "
        + ", ".join(TEMPLATES),
    )
    scores: str = flag(
        "",
        "take the scores from this copy of a run's samples.jsonl, with reference_reward, "
        "reference_cost, policy_reward, policy_cost",
        path=True,
    )
    export: str = flag(
        "",
        "write the run's policy into this new Hugging Face folder, and do nothing else",
        path=True,
    )
    export_adapter: str = flag(
        "",
        "write the adapters of the run's policy into this new folder, as PEFT keeps them, and do "
        "nothing else",
        path=True,
    )
    export_dtype: str = flag(
        "auto",
        "type of the weights that --export writes; auto: that in which the model came if it holds "
        "what was learned, else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    json: str = flag("", "write every figure to this file", path=True)
    plot: str = flag(
        "", "draw helpfulness against harmless ratio into this .png, .svg or .pdf", path=True
    )

    IDLE: ClassVar = {
        "chat": (
            "prompt",
            "export",
            "export_adapter",
            "data",
            "split",
            "max_length",
            "eval_prompts",
            "judge_template",
            *SHOWN,
        ),
        "prompt": (
            "export",
            "export_adapter",
            "data",
            "split",
            "max_length",
            "judge_template",
            *SHOWN,
        ),
        "export": ("export_adapter", "split", "dtype", *EVAL_FLAGS, *SHOWN),
        "export_adapter": ("data", "split", "dtype", "device", *EVAL_FLAGS, *SHOWN),
        "scores": ("reward_model", "cost_model", "judge_template"),
    }
    NEEDS: ClassVar = {"export_dtype": "export"}


def usual_alpha(rank):
    """α of adapters where --lora_alpha is left out."""
    return 2.0 * rank


def other_loss(flags):
    """{flag: value} where a run's loss is not SafeDPO's alone. Older runs lack these flags."""
    names = ["loss", "anchor"] + ["epsilon"] * (flags.get("loss") == "robust")
    usual = {name: getattr(TrainConfig, name) for name in names}
    return {name: flags[name] for name in usual if flags.get(name, usual[name]) != usual[name]}


# a checkpoint brings its own
SIZE_FLAGS = ("vocab_size", "n_layer", "n_head", "n_kv_head", "d_model", "d_ff")
# a run that an earlier version began does not know them
NEW_FLAGS = ("sample_every", "log", "loss", "epsilon", "anchor")
# may change on --resume: the gradients are the same
FREE_FLAGS = (
    "resume", "out_dir", "verbose", "fsdp", "checkpointing", "compile", "micro_batch_size",
    "sample_every", "log",
)  # fmt: skip
# what a reference trained by SFT depends on, beside the data
REFERENCE_FLAGS = (
    *SIZE_FLAGS, "init_from", "prompt_template", "seed", "device", "dtype", "max_length",
    "sft_epochs", "sft_lr", "sft_batch_size", "micro_batch_size", "warmup", "weight_decay",
    "beta2", "grad_clip",
)  # fmt: skip
