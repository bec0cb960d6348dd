"""Turn weights from the lecture's own code into checkpoints of this project.

Did you type along with "Let's build GPT" and save your model's state_dict? Then sample from it:

    python bigram-to-gpt.py sample --weights yours.pt

The script calls this module when it meets such a file. The two models compute the same, but some
things have other names or shapes. In the lecture, each head of attention has three small matrices;
here one matrix, qkv, stacks all of them. The lecture's masks (tril) are not parameters and are left
out. And some layers are renamed.
"""

import math

import torch

RENAMED = {  # the lecture's names, and ours
    "_embedding_table.": "_embedding.",
    ".sa.proj.": ".attention.proj.",
    ".ffwd.net.0.": ".feed_forward.up.",
    ".ffwd.net.2.": ".feed_forward.down.",
}
OUTSIDE = "token_embedding_table.weight position_embedding_table.weight lm_head.weight lm_head.bias"
BLOCK = (
    "ln1.weight ln1.bias sa.proj.weight sa.proj.bias ln2.weight ln2.bias "
    "ffwd.net.0.weight ffwd.net.0.bias ffwd.net.2.weight ffwd.net.2.bias"
)
# The parts of the lecture's earlier stages, those without blocks.
EARLIER = {"token_embedding_table", "position_embedding_table", "sa_head", "sa_heads", "ffwd"}
EARLIER |= {"ln_f", "lm_head"}


def convert(checkpoint, text, loss_of):
    """A checkpoint of ours, as a dict, and a line that says how well it fits the text.

    The code on GitHub divides attention scores by the root of head_size, as we do. The video and
    its Colab notebook divide them by the root of n_embd, which is larger by the root of n_head.
    So their queries have to be divided by the root of n_head. loss_of(checkpoint, text) shows which
    of the two it is. ValueError if this is not a state_dict of the lecture's last model, or a dict
    that holds one.
    """
    beginning = text[:5000]
    github = for_github(checkpoint, "".join(sorted(set(text))))
    video = for_video(github)
    video_loss = loss_of(video, beginning)
    untrained = math.log(len(github["vocab"]))
    chosen = github
    version = "code on GitHub"
    loss = loss_of(github, beginning)
    if video_loss < 0.98 * loss and video_loss < 0.8 * untrained:
        chosen = video
        version = "video or Colab notebook"
        loss = video_loss
    line = f"weights that fit the lecture's {version}: loss {loss:.2f} on the first "
    line += f"{len(beginning):,} characters ({untrained:.2f} if untrained)"
    if not loss < 0.8 * untrained:  # nan, too
        line += "; WARNING: another text, or a changed model?"
    return chosen, line


def for_github(checkpoint, vocab):
    """A checkpoint of ours that computes what the code on GitHub does with these weights."""
    prefix, theirs = find_weights(checkpoint)
    n_layer = len({name.split(".")[1] for name in theirs if name.startswith("blocks.")})
    if f"blocks.{n_layer - 1}.weight" in theirs:  # a stage in which ln_f was the last of the blocks
        n_layer -= 1
        last = f"blocks.{n_layer}."
        theirs = {name.replace(last, "ln_f."): theirs[name] for name in theirs}
    # The part of a name at place 4 is the number of a head: blocks.0.sa.heads.NUMBER.key.weight.
    heads = {name.split(".")[4] for name in theirs if name.startswith("blocks.0.sa.heads.")}
    n_head = max(1, len(heads))  # if there is none, check_names says which name is missing
    parts = our_parts(n_layer, n_head, "ln_f.weight" in theirs)
    check_names(theirs, [name for names in parts.values() for name in names], prefix)

    ours = {name: torch.cat([theirs[part].float() for part in parts[name]]) for name in parts}
    if "ln_f.weight" in ours and (ours["ln_f.weight"] == 1).all() and not ours["ln_f.bias"].any():
        del ours["ln_f.weight"], ours["ln_f.bias"]  # never trained, so the model did not use it
    V, C = ours["token_embedding.weight"].shape
    T = len(ours["position_embedding.weight"])
    if len(ours["blocks.0.attention.qkv.weight"]) != 3 * C:
        raise ValueError(f"n_head ({n_head}) times the size of a head is not n_embd ({C})")
    if len(vocab) != V:
        raise ValueError(f"the model knows {V} characters, the text has {len(vocab)}: see --input")
    config = dict(vocab_size=V, block_size=T, n_layer=n_layer, n_head=n_head, n_embd=C)
    return dict(config=config, vocab=vocab, model=ours, training={})


def for_video(github):
    """The same for the video's code: a copy with smaller queries."""
    weights = dict(github["model"])
    C = github["config"]["n_embd"]
    for n in range(github["config"]["n_layer"]):
        query, key_and_value = weights[f"blocks.{n}.attention.qkv.weight"].split((C, 2 * C))
        query = query / math.sqrt(github["config"]["n_head"])
        weights[f"blocks.{n}.attention.qkv.weight"] = torch.cat((query, key_and_value))  # (3 C, C)
    return github | {"model": weights}


def find_weights(checkpoint):
    """The prefix of the names in a checkpoint, and its weights without prefix and masks.

    The checkpoint is a state_dict of the lecture's last model, or a dict that holds one. If the
    model was compiled, all names begin with "_orig_mod.".
    """
    if not isinstance(checkpoint, dict):
        raise ValueError("it holds no dict of weights")
    dicts = [part for part in (checkpoint, *checkpoint.values()) if isinstance(part, dict)]
    for weights in dicts:
        for key in map(str, weights):
            if key.endswith("token_embedding_table.weight"):
                prefix = key.removesuffix("token_embedding_table.weight")
                named = {str(name).removeprefix(prefix): weights[name] for name in weights}
                return prefix, {name: named[name] for name in named if not name.endswith("tril")}
    found = ", ".join(map(str, list(max(dicts, key=len))[:3]))
    raise ValueError(
        f"neither the lecture's weights nor a file from grow or the notebook's last cells: {found}"
    )


def our_parts(n_layer, n_head, ln_f):
    """Our names, each with the lecture's names of the tensors that are stacked in it."""
    names = OUTSIDE.split() + (["ln_f.weight", "ln_f.bias"] if ln_f else [])
    names += [f"blocks.{n}.{name}" for n in range(n_layer) for name in BLOCK.split()]
    parts = {}
    for name in names:
        ours = name
        for old, new in RENAMED.items():
            ours = ours.replace(old, new)
        parts[ours] = [name]
    for n in range(n_layer):
        parts[f"blocks.{n}.attention.qkv.weight"] = [
            f"blocks.{n}.sa.heads.{head}.{kind}.weight"
            for kind in ("query", "key", "value")
            for head in range(n_head)
        ]
    return parts


def check_names(found, wanted, prefix):
    """ValueError if names are found that are not wanted, or the other way round."""
    if {name.split(".")[0] for name in found} <= EARLIER:
        raise ValueError("an earlier stage of the lecture, without blocks: only the last one fits")
    complaints = []
    for complaint, names, others in (("unexpected", found, wanted), ("missing", wanted, found)):
        names = [prefix + name for name in names if name not in others]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            complaints.append(f"{complaint} {', '.join(names[:3])}{more}")
    if complaints:
        raise ValueError(f"names not as in the lecture's last model: {'; '.join(complaints)}")
