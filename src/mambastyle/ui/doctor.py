"""The Doctor tab: what `mambastyle doctor` prints."""

import html

import gradio as gr

from mambastyle.api import examine

MARKS = {"ok": "✓", "broken": "✗", "absent": "–"}


def report() -> str:
    """The findings as a table."""
    rows = "".join(
        f'<tr class="{finding.state}"><td>{MARKS[finding.state]}</td><th scope="row">{finding.what}</th>'
        f"<td>{finding.state}</td><td>{html.escape(finding.detail)}</td></tr>"
        for finding in examine()
    )
    return f'<table class="doctor"><tbody>{rows}</tbody></table>'


def tab(selected: gr.Tab) -> None:
    """Build the tab inside the current Blocks; it is examined when it is first looked at."""
    table = gr.HTML("", elem_id="doctor-table")
    again = gr.Button("Examine again", size="sm", elem_id="doctor-again")
    for event in (selected.select, again.click):
        event(report, None, table, concurrency_id="doctor", api_visibility="private")
