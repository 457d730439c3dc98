"""Shows the examples that a fine-tune would be trained on.

    python -m recipes.preview
    python -m recipes.preview model_name=Qwen/Qwen3-0.6B dataset=chats.jsonl
    python -m recipes.preview config=configs/no_robots_qwen3.yaml num_examples=10

Accepts every key of recipes.sft. It prints some examples with trained tokens in colour, and writes a page
with more examples and a histogram of all lengths.
"""

from __future__ import annotations

from pathlib import Path

import chz

from cookbook import models
from cookbook.config import cli
from cookbook.errors import ConfigError
from cookbook.supervised import train
from cookbook.utils import files
from cookbook.utils.rich_console import make_console, plain, plain_line
from recipes.sft import DEFAULTS


@chz.chz
class PreviewConfig(train.Config):
    """The run, and the number of examples to show."""

    num_examples: int = chz.field(default=3, doc="examples to print")
    html: str | None = chz.field(default="preview.html", doc="the page to write; None: do not write one")
    num_html_examples: int = chz.field(default=50, doc="examples on the page")

    @chz.validate
    def _check_page(self) -> None:
        if self.html is not None and not Path(self.html).expanduser().absolute().parent.is_dir():
            raise ConfigError(
                f"html={self.html}: its folder does not exist. Create the folder, or give another path."
            )

    @chz.validate
    def _check_numbers(self) -> None:
        if self.num_examples < 0 or self.num_html_examples < 0:
            raise ConfigError(
                f"Invalid num_examples={self.num_examples} and num_html_examples={self.num_html_examples}: "
                f"both must be >= 0."
            )


async def run(config: PreviewConfig) -> None:
    from cookbook.data import preview  # these take longer to import than help takes
    from cookbook.data.types import ChatDatasetBuilder
    from cookbook.report import preview_page
    from cookbook.supervised.start import sentence_on_mode, trained_mode, warn_about_template

    builder = config.data_builder
    models.check_vocabulary(config.model_name)
    train_data, eval_data = builder()
    name, facts = config.model_name, []
    if isinstance(builder, ChatDatasetBuilder):
        common = builder.common_config
        name = common.model_name_for_tokenizer
        warn_about_template(name, str(common.renderer_name))
        facts = [f"Renderer: {common.renderer_name}", f"Trained: {common.train_on_what}"]
    if mode := trained_mode(config, train_data):
        facts.append(sentence_on_mode(mode))
    tokenizer = models.get_tokenizer(name, tuple(config.add_tokens))
    number = max(config.num_examples, config.num_html_examples if config.html else 0)
    examples = preview.first_examples(train_data, number, tokenizer)
    console = make_console()
    eval_reports = [] if eval_data is None else eval_data.reports()
    for report in dict.fromkeys([*train_data.reports(), *eval_reports]):
        console.print(plain("\n".join(report.lines())))
    if mode:
        console.print(plain_line(sentence_on_mode(mode)))
    preview.print_examples(examples[: config.num_examples], console)
    if config.html is not None:
        reports = train_data.reports()
        page = preview_page(
            "What is trained",
            [f"Model: {name}", *facts],
            report_lines=[line for report in reports for line in report.lines()],
            lengths=[report.lengths for report in reports],
            max_length=max((report.max_length or 0 for report in reports), default=0),
            examples=examples[: config.num_html_examples],
        )
        path = Path(config.html).expanduser()
        files.write(path, page)
        console.print(plain_line(f"Wrote {path}."))


def main(argv: list[str] | None = None) -> None:
    cli.run(PreviewConfig, run, DEFAULTS, prog="recipes.preview", argv=argv)


if __name__ == "__main__":
    main()
