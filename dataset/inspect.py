r"""What is in a data file, as its trainer reads it, before anything is trained.

    python dataset/inspect.py --train_file rows.jsonl --ckpt_dir DIR [--use_chat_template] \
        [--max_seq_len 1024] [--out report.html]

Counts, lengths, what --max_seq_len would leave out, what comes twice, and some rows with their loss
mask, in colour where the terminal has some (NO_COLOR turns it off). Rows that cannot be encoded, or
whose mask cannot be found, are named; then the exit code is 2.
"""

import sys
from pathlib import Path

# Run as a script, the repository's root is not on the path, from which src and dataset import; this
# folder is, and goes behind Python's own modules, one of which has the name of inspect.py.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.sort(key=lambda path: Path(path).resolve() == Path(__file__).resolve().parent)

from functools import partial

from src.cli import run
from src.settings.scripts import InspectSettings


def main(settings: InspectSettings) -> None:
    """Read the rows, count, and show some."""
    from dataset.report import Report, lines_of, page_of, takes_colour
    from src.checkpoint.source import Checkpoint, check_model_type
    from src.data.inspection import inspected, tokens_of
    from src.data.rows import write_text
    from src.data.tokenizer import Tokenizer
    from src.errors import UserError
    from src.inputs import check_writable, open_tokenizer
    from src.trainer.inputs import mask_of, source_of

    model, source, shown = settings.model, settings.data.train_file, settings.shown
    if shown.out is not None:
        check_writable(shown.out, ".html", source)

    # The tokenizer, as the trainers open it.
    if model.ckpt_dir is not None:
        checkpoint = Checkpoint.open(model.ckpt_dir, model.config_file, model.adapter_dir)
        check_model_type(checkpoint.config, model.model_type)
        tokenizer = open_tokenizer(model, checkpoint)
    else:
        file = Path(model.tokenizer_file or "")
        tokenizer = Tokenizer.find(
            file.parent,
            str(file),
            model.use_chat_template,
            model.model_type or "llama",
            model.special_tokens,
            model.chat_date,
        )

    # The rows, as the trainers read them.
    found = inspected(source_of(settings.data), shown.kind, tokenizer, mask_of(settings.loss))
    report = Report(source, found, shown.max_seq_len, shown.examples)
    of_sequence = partial(tokens_of, tokenizer)
    if shown.out is not None:
        write_text(shown.out, page_of(report, of_sequence))
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    for line in lines_of(report, of_sequence, takes_colour(sys.stdout)):
        print(line)
    if shown.out is not None:
        print(f"written to {shown.out}")
    if found.broken:
        raise UserError(
            f"{source}: {len(found.broken)} of its rows are refused, as a trainer would; correct "
            "them, or take them out"
        )


command = partial(run, main)

if __name__ == "__main__":
    command()
