"""``report.html`` of a comparison, its plots as files, and a sheet of pictures at equal reward."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sqdf_fast import __version__
from sqdf_fast.compare.curves import Estimate
from sqdf_fast.compare.drawing import inline_svg, save, stylesheet
from sqdf_fast.compare.figures import Figure, figures
from sqdf_fast.compare.protocol import dump_protocol
from sqdf_fast.compare.results import Duel, Results
from sqdf_fast.compare.table import (
    duel_sentence,
    duel_table,
    end_table,
    equal_table,
    label,
    level_sentence,
    missing_table,
    tuning_sentence,
    tuning_table,
)
from sqdf_fast.display import save_png
from sqdf_fast.display.elements import figure_table
from sqdf_fast.files import disk_errors
from sqdf_fast.runs.page import STYLE, data_uri
from sqdf_fast.runs.samples import read_samples

VERDICT_SCORES = ("true_reward", "attribute_accuracy", "alignment", "diversity")
GRID_COLUMNS = 8
_TILE, _NAME_WIDTH = 96, 190
_STYLE = """
.verdict p { margin: 0 0 8px; max-width: none; font-size: 17px; }
.figures table { font-size: 13px; }
.figures td, .figures th[scope=col] { padding-right: 12px; }
.figures th[scope=col] { white-space: normal; vertical-align: bottom; }
.figures tr:last-child th, .figures tr:last-child td { font-weight: inherit; }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); }
.chart svg { font-family: inherit; }
.chart svg text { fill: currentColor; }
main { max-width: 1240px; }
pre { font-size: 12.5px; overflow-x: auto; background: var(--card); border: 1px solid var(--rule); padding: 12px 14px;
  border-radius: 10px; }
.film th[scope=row] { text-align: right; padding-right: 10px; vertical-align: middle; white-space: nowrap; }
.film th[scope=col] { max-width: 104px; white-space: normal; vertical-align: bottom; }
"""


def write_page(results: Results, folder: Path) -> Path:
    """Write ``report.html`` and ``plots/``. Raises UserError when the disk refuses."""
    drawn = {group: figures(results, group) for group in results.groups}
    for found in drawn.values():
        for figure in found:
            save(figure.drawing, folder / "plots" / figure.name)
    for group in results.groups:
        _save_sheet(results, group, folder)
    path = folder / "report.html"
    partial = path.with_name("report.html.partial")
    with disk_errors(path):
        partial.write_text(render_page(results, drawn), encoding="utf-8")
        partial.replace(path)
    return path


def render_page(results: Results, drawn: dict[str, list[Figure]]) -> str:
    """The page as text. It asks the network for nothing."""
    config = results.protocol
    methods = [results.runs[index].label for index in results.of("")]
    title = f"{len(methods)} method{'s' * (len(methods) > 1)} under one budget"
    facts = f"{_budget(config.budget)} a run · seeds {', '.join(map(str, config.seeds))}"
    sections = [
        f'<h1>{escape(title)}</h1><div class="soft">{escape(facts)}</div>'
        f'<div class="verdict">{"".join(f"<p>{escape(line)}</p>" for line in verdict(results))}</div>',
        _unfinished(results),
        *(_group(results, group, drawn.get(group, [])) for group in results.groups),
        _tuning(results),
        f"<h2>Protocol</h2><pre>{escape(dump_protocol(config))}</pre>",
        _environment(results),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}{_STYLE}{stylesheet()}</style></head>"
        f"<body><main>{''.join(sections)}<footer>Written by sqdf-fast {escape(__version__)}.</footer></main></body>"
        "</html>\n"
    )


def _budget(text: str) -> str:
    return f"{int(text):,} UNet evaluations" if text.isdigit() else text


def verdict(results: Results) -> list[str]:
    """A sentence for each score: than whose the first method's is clearly higher or lower at equal reward."""
    duels = results.duels_of("")
    if not duels:
        return ["Fewer than two methods have finished runs."]
    found = [(score, standing) for score in VERDICT_SCORES if (standing := _standing_words(duels, score))]
    if not found:
        return ["No score but the proxy reward was measured."]
    (score, standing), *others = found
    first = f"At equal proxy reward, the {label(score)} of {duels[0].one} is {standing}."
    return [first, *(f"Its {label(score)} is {standing}." for score, standing in others)]


def _standing_words(duels: Sequence[Duel], score: str) -> str:
    signs = {duel.other: _sign(duel.differences[score]) for duel in duels if score in duel.differences}
    words = {1: "higher than", -1: "lower than", 0: "not clearly different from"}
    names = {word: [name for name, found in signs.items() if found == sign] for sign, word in words.items()}
    return "; ".join(f"{word} {', '.join(there)}" for word, there in names.items() if there)


def _sign(found: Estimate) -> int:
    if found.low is None or found.high is None:
        return 0
    return 1 if found.low > 0 else -1 if found.high < 0 else 0


def _unfinished(results: Results) -> str:
    heads, rows = missing_table(results)
    return f"<h2>Runs that are missing</h2>{figure_table(heads, rows)}" if rows else ""


def _group(results: Results, group: str, drawn: Sequence[Figure]) -> str:
    heading = f"Ablation: {label(group)}" if group else "Methods"
    parts = [f"<h2>{escape(heading)}</h2>"]
    charts = "".join(
        f'<figure class="chart"><figcaption>{escape(figure.drawing.title)}</figcaption>{inline_svg(figure.drawing)}'
        "</figure>"
        for figure in drawn
    )
    if charts:
        parts.append(
            '<p class="soft">Mean over seeds, a mark an evaluation, the large one the last; the pale band joins the '
            "points that no other beats in both. A curve that leaves a plot has its large mark there and the height "
            "of its end beside its name.</p>"
            f'<div class="charts">{charts}</div>'
        )
    parts.append(_film(results, group))
    if results.duels_of(group):
        parts += [
            f'<p class="soft">{escape(duel_sentence(results, group))}. Bold where the interval leaves out 0.</p>',
            figure_table(*duel_table(results, group), differences=True),
        ]
    if level := level_sentence(results, group):
        parts += [f'<p class="soft">{escape(level)}.</p>', figure_table(*equal_table(results, group))]
    parts += [
        '<p class="soft">At the end of training. Mean over seeds; small: the 95 % bootstrap interval.</p>',
        figure_table(*end_table(results, group)),
    ]
    return "".join(parts)


def _film(results: Results, group: str) -> str:
    pictures = _at_equal_reward(results, group)
    if not pictures:
        return ""
    prompts = pictures[0][1]
    head = "".join(f'<th scope="col">{escape(prompt)}</th>' for prompt in prompts)
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{_picture(path, name)}</td>" for path in paths)}</tr>'
        for name, _, paths in pictures
    )
    return (
        '<p class="soft">The same prompts and noise, first seed, at the evaluation nearest to equal proxy reward.</p>'
        f'<div class="film"><table><tr><td></td>{head}</tr>{rows}</table></div>'
    )


def _picture(path: Path | None, name: str) -> str:
    source = None if path is None else data_uri(path)
    if source is None:
        return '<span class="missing">missing</span>'
    return f'<img src="{source}" alt="{escape(name)}">'


def _at_equal_reward(results: Results, group: str) -> list[tuple[str, list[str], list[Path | None]]]:
    """Name, prompts and pictures: of the base model first, then of each method that reaches the level."""
    found: list[tuple[str, list[str], list[Path | None]]] = []
    for index in results.of(group):
        run = results.runs[index]
        if not run.folders or results.places[index][0] is None:
            continue
        place, samples = results.places[index][0], read_samples(run.folders[0])
        assert place is not None
        steps = [0, run.curves[0].points[place.nearest].step]
        if any(step not in samples.steps for step in steps):
            continue
        prompts = samples.prompts[:GRID_COLUMNS]
        if not found:
            found.append(("base model", prompts, samples.steps[0][:GRID_COLUMNS]))
        found.append((run.label, prompts, samples.steps[steps[1]][:GRID_COLUMNS]))
    return found


def _save_sheet(results: Results, group: str, folder: Path) -> None:
    rows = _at_equal_reward(results, group)
    if not rows:
        return
    gap, heading = 6, 40
    width = _NAME_WIDTH + len(rows[0][1]) * (_TILE + gap) + gap
    sheet = Image.new("RGB", (width, heading + len(rows) * (_TILE + gap) + gap), "white")
    pen, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(size=15), ImageFont.load_default(size=11)
    for column, prompt in enumerate(rows[0][1]):
        left = _NAME_WIDTH + column * (_TILE + gap)
        for line, text in enumerate(_two_lines(prompt)):
            pen.text((left, 6 + 15 * line), text, (98, 106, 120), small)
    for row, (name, _, paths) in enumerate(rows):
        top = heading + row * (_TILE + gap)
        pen.text((_NAME_WIDTH - 12, top + _TILE / 2), name, (40, 44, 52), font, "rm")
        for column, path in enumerate(paths):
            if path is not None:
                with Image.open(path) as picture:
                    tile = picture.convert("RGB").resize((_TILE, _TILE), Image.Resampling.BICUBIC)
                sheet.paste(tile, (_NAME_WIDTH + column * (_TILE + gap), top))
    prefix = f"ablation_{group}" if group else "methods"
    save_png(sheet, folder / "plots" / f"{prefix}_pictures_at_equal_reward.png")


def _two_lines(text: str, letters: int = 17) -> list[str]:
    words, lines = text.split(), [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + 1 + len(word) > letters:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines[:2]


def _tuning(results: Results) -> str:
    tuning = results.protocol.tuning
    if tuning is None or not results.choices:
        return ""
    effort = f"{tuning.trials} trials a method, {_budget(tuning.budget)} each, seed {tuning.seed}."
    text = escape(f"{effort} {tuning_sentence(results)}")
    return f'<h2>Tuning</h2><p class="soft">{text}</p>{figure_table(*tuning_table(results))}'


def _environment(results: Results) -> str:
    rows = [[name, value] for name, value in results.environment.items()]
    return f"<h2>Environment</h2>{figure_table(['', ''], rows)}" if rows else ""
