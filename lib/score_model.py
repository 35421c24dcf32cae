"""Score models, which judge answers: reward and cost models, from Hugging Face folders."""

from lib import hub
from lib.device import use_cpu
from lib.hf_config import read_config
from lib.hf_tokenizer import load_tokenizer
from lib.hf_weights import HEAD, empty_model, load_weights, weight_files, weights_by_hf_name

import torch
import torch.nn as nn

from model import Transformer


class ScoreModel(Transformer):
    """A transformer whose head has one row. It is read at an answer's last token."""

    def __init__(self, config):
        super().__init__(config)
        self.head = nn.Linear(config.d_model, 1)

    def forward(self, rows):
        """The score of each row's one answer: (A,) float32."""
        hidden = self.hidden(rows.tokens, rows.position, *self.attended(rows))
        last = rows.answer.bincount().cumsum(0) - 1  # (A,) index into the rows' answer tokens
        place = rows.position[rows.predictor[last]] + 1  # the predictor is the token before
        end = rows.sequences.gather(1, place[:, None]).squeeze(1)
        return self.head(hidden[end]).squeeze(-1).float()


def load_judge(folder, template, answers, device, dtype="float32"):
    """(model with its matrices in dtype, examples) of a folder and [(prompt, answer), …].

    examples: [(ids of prompt and answer, [[EOS]]), …]. model(pack_rows(examples)) are the scores.
    Prompt and answer are encoded as one text, as in the training of these models: scores depend on
    it. The head is score_head (beaver's) or score (transformers' sequence classifiers), its bias 0
    where the files have none. ValueError names what does not fit.
    """
    folder = hub.model_path(folder)
    tokenizer = load_tokenizer(folder, template)
    files = weight_files(folder)
    prompts, texts = zip(*answers)
    examples = [(ids, [[tokenizer.eos]]) for ids in tokenizer.dialogues(prompts, texts)]
    longest = max(len(ids) + 1 for ids, _ in examples)
    hf, config = read_config(folder, tokenizer, longest, tie_word_embeddings=False)
    if "score_head.weight" in files:
        head = "score_head"
    elif "score.weight" in files:
        head = "score"
    else:
        raise ValueError(
            f"{folder}: no score_head.weight and no score.weight among its weights; "
            "expected a score model"
        )
    if hf.get("do_normalize") or hf.get("score_dim", 1) != 1:
        raise ValueError(
            f"{folder / 'config.json'}: do_normalize is true or score_dim is not 1; "
            "expected one score as the head gives it"
        )
    model = empty_model(ScoreModel, config, device, getattr(torch, dtype))
    weights = weights_by_hf_name(model)
    del weights[HEAD]
    weights[f"{head}.weight"] = model.head.weight
    if f"{head}.bias" in files:
        weights[f"{head}.bias"] = model.head.bias
    else:
        nn.init.zeros_(model.head.bias)
    load_weights(weights, files, ignored=("normalizer.", "lm_head."))
    if torch.device(device).type == "cpu":
        use_cpu(model)
    return model.eval(), examples
