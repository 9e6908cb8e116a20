"""The configuration: what is wrong is said at once, and helps."""

import pytest

from llmrec.config import Config
from llmrec.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"trainin": {}}, "trainin: no such setting; did you mean training?"),
        ({"lm": {"rnk": 3}}, "lm.rnk: no such setting; did you mean rank?"),
        ({"lm": {"mode": "yes_no", "lsted": 3}}, "lm.lsted: no such setting; did you mean listed?"),
        ({"retrieval": {"sasrec": {"dims": 3}}}, "retrieval.sasrec.dims: no such setting; did you mean dim?"),
        ({"beside": [{"lm": {"layer": 2}}]}, "beside.0.lm.layer: no such setting; did you mean layers?"),
        ({"data": {"zzz": 1}}, "there are items_mapping, events_mapping, items_ignore"),
    ],
)
def test_a_setting_that_there_is_not_is_answered_with_those_that_there_are(given, said):
    with pytest.raises(ConfigError) as caught:
        Config.of(given)
    assert said in str(caught.value)


def test_all_problems_are_said_at_once_and_no_url():
    secret = "postgresql://user:secret@host/database"
    with pytest.raises(ConfigError) as caught:
        Config.of({"store": {"url": "ftp://user:secret@host", "urls": secret}, "lm": {"rank": 0}})
    message = str(caught.value)
    for whole in ({"store": secret}, {"index": secret}, {"engine": [secret]}):
        with pytest.raises(ConfigError) as section:
            Config.of(whole)
        assert "secret" not in str(section.value)
    with pytest.raises(ConfigError, match=r"index.exact_up_to: .* \(got -5\)"):
        Config.of({"index": {"exact_up_to": -5}})
    assert message.startswith("3 problem(s)") and "lm.rank: " in message and "(got 0)" in message
    assert "did you mean url?" in message and "secret" not in message
