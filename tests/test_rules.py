"""Which rules are refused, and by which sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_alerts import history, judged

from reconkit import rules
from reconkit.config import ConfigError


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "one [[rule]] table or more"),
        ("[[rule]", "not valid TOML"),
        ("x = 1", "the key is 'x'"),
        ("[rule]\nname = 'a'", "one [[rule]] table or more"),
        ("{metric = 'nmse', limit = 1}", "rule 1: name is 'missing'"),
        ("{name = 'a', limit = 1}", "rule 'a': metric is 'missing'"),
        ("{name = '', metric = 'nmse', limit = 1}", "one line of text"),
        ('{name = "a\\nb", metric = "nmse", limit = 1}', "one line of text"),
        ("{name = 3, metric = 'nmse', limit = 1}", "one line of text"),
        ("{name = 'a', metric = 'nmse', limit = 1, limits = 2}", "the key is 'limits'; it must be one of name, metric, test_set, against"),
        ("{name = 'a', metric = 'nmse', limit = 1, source = 'x'}", "the key is 'source'"),
        ("{name = 'a', metric = 'perplexty', limit = 1}", "metric is 'perplexty'; it must be one of accuracy, "),
        ("{name = 'a', metric = 'gap', limit = 2}", "rule 'a': metric is 'gap'; it must be 'error ratio', its new name."),
        ("{name = 'a', metric = 'perplexity', test_set = 'wikki', limit = 9}", "test_set is 'wikki'; it must be one of mine.txt, wiki"),
        ("{name = 'a', metric = 'sparsity', test_set = 'x', limit = 0.1, direction = 'higher'}", "test_set is 'x'; it must be left out"),
        ("{name = 'a', metric = 'perplexity'}", "what it allows is 'missing'; it must be limit alone, or relative or absolute"),
        ("{name = 'a', metric = 'perplexity', against = 'dense'}", "what it allows is 'missing'"),
        ("{name = 'a', metric = 'perplexity', relative = 0.1}", "what it allows is 'relative'; it must be limit alone"),
        ("{name = 'a', metric = 'perplexity', against = 'dense', limit = 3}", "what it allows is 'limit'; it must be relative or absolute"),
        ("{name = 'a', metric = 'perplexity', against = 'dense', relative = 0.1, absolute = 1}", "what it allows is 'relative, absolute'"),
        ("{name = 'a', metric = 'perplexity', against = 'dense', relative = -0.1}", "relative is -0.1; it must be at least 0 as a share"),
        ("{name = 'a', metric = 'perplexity', against = 'dense', relative = nan}", "relative is nan; it must be a number"),
        ("{name = 'a', metric = 'perplexity', against = 'dense', absolute = inf}", "absolute is inf; it must be a number"),
        ("{name = 'a', metric = 'perplexity', against = 'dense', relative = '2 %'}", "relative is '2 %'; it must be a number"),
        ("{name = 'a', metric = 'perplexity', against = 'dense', relative = true}", "relative is True; it must be a number"),
        ("{name = 'a', metric = 'perplexity', against = '', relative = 0.1}", "against is ''"),
        ("{name = 'a', metric = 'perplexity', against = 3, relative = 0.1}", "against is 3"),
        ("{name = 'a', metric = 'perplexity', limit = 0.5}", "limit is 0.5; it must be at least 1"),
        ("{name = 'a', metric = 'nmse', limit = -1}", "limit is -1; it must be at least 0"),
        ("{name = 'a', metric = 'accuracy', limit = 1.5}", "limit is 1.5; it must be above 0 and at most 1"),
        ("{name = 'a', metric = 'accuracy', limit = 0}", "limit is 0; it must be above 0"),
        ("{name = 'a', metric = 'accuracy', against = 'dense', absolute = 2}", "must be at least 0 in the unit of accuracy, and below 1"),
        ("{name = 'a', metric = 'accuracy', against = 'dense', relative = 1}", "or the rule can never fire"),
        ("{name = 'a', metric = 'speed', test_set = 'decode_tokens_per_second/1', against = 'parent', relative = 1.5}", "or the rule can never fire"),
        ("{name = 'a', metric = 'verdict', limit = 'overfitting'}", "limit is 'overfitting'; it must be one of fine, watch"),
        ("{name = 'a', metric = 'verdict', limit = 1}", "limit is 1; it must be one of fine, watch"),
        ("{name = 'a', metric = 'verdict', against = 'parent', relative = 0.1}", "verdicts have no ratio"),
        ("{name = 'a', metric = 'verdict', against = 'parent', absolute = 2}", "can never fire"),
        ("{name = 'a', metric = 'nmse', limit = 1, severity = 'fatal'}", "severity is 'fatal'; it must be one of error, warning"),
        ("{name = 'a', metric = 'nmse', limit = 1, direction = 'down'}", "direction is 'down'; it must be one of lower, higher"),
        ("{name = 'a', metric = 'nmse', limit = 1, direction = 'higher'}", "direction is 'higher'; it must be lower"),
        ("{name = 'a', metric = 'speed', test_set = 'first*', limit = 1, direction = 'higher'}", "direction is 'higher'; it must be lower"),
        ("{name = 'a', metric = 'sparsity', against = 'parent', absolute = 0.1}", "direction is 'missing'; it must be one of lower, higher"),
        ("{name = 'a', metric = 'mine', limit = 0.1}", "direction is 'missing'"),
        (
            "{name = 'a', metric = 'nmse', limit = 1}, {name = 'a', metric = 'error ratio', limit = 2}",
            "name is 'a'; it must be given to one rule only",
        ),
    ],
)
def test_bad_rules_are_refused_by_name(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "rules.toml"
    file.write_text(f"rule = [{text}]" if text.startswith("{") else text)
    known = history({"perplexity/mine.txt": 9.0, "mine/x": {"value": 1.0, "direction": ""}})[1]
    with pytest.raises(ConfigError) as error:
        rules.load_rules(file, known)
    assert says in str(error.value) and str(error.value).startswith("rules.toml") and "\n" not in str(error.value)


def test_rules_may_name_what_the_history_holds(tmp_path: Path) -> None:
    file = tmp_path / "rules.toml"
    file.write_text(
        "rule = [{name = 'a', metric = 'mine', limit = -3.5, direction = 'lower'},"
        "{name = 'b', metric = 'perplexity', test_set = 'mine.txt', limit = 9}]"
    )
    with pytest.raises(ConfigError, match="metric is 'mine'"):
        rules.load_rules(file)
    frames = history({"perplexity/mine.txt": 9.5, "mine/x": {"value": 1.0, "direction": ""}})
    assert judged(frames, rules.load_rules(file, frames[1]))[0] == ["mine/x", "perplexity/mine.txt"]


def test_a_missing_file_says_how_to_write_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'There is no file of rules .*none.toml; .*--rules.* metric = "perplexity"'):
        rules.load_rules(tmp_path / "none.toml")
