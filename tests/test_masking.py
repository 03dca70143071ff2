"""Secrets do not leave the machine, and what is no secret does."""

import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracking.masking import MASK, is_secret, mask_argv, mask_setting, mask_text, mask_tree, secrets_in


def _words(text: str) -> list[str]:
    return text.split()


SECRET_KEYS = _words(
    """
    password db_password MYSQL_PWD passphrase client_secret secretName token hf_token HF_TOKEN
    access_token accessToken --token api_key apiKey API-KEY openai.api_key AWS_SECRET_ACCESS_KEY
    aws_access_key_id private_key credentials MLFLOW_TRACKING_PASSWORD MLFLOW_TRACKING_TOKEN sig
    auth X-Amz-Signature db.password
    """
)
OPEN_KEYS = _words(
    """
    tokenizer max_tokens n_keys tokens num_tokens keys key sort_key key_padding_mask pad_token
    eos_token token_type_ids pad_token_id mask_token tokenize secretary_count author authors
    keyboard monkey lr signal n_heads keep_every public_key passes compass bypass sign design
    """
)


@pytest.mark.parametrize("key", SECRET_KEYS)
def test_keys_of_secrets(key: str) -> None:
    assert is_secret(key)
    assert mask_setting(key, "hunter2") == MASK
    assert mask_setting(key, {"inner": ["hunter2"]}) == {"inner": [MASK]}
    assert mask_setting(key, 3) == 3


@pytest.mark.parametrize("key", OPEN_KEYS)
def test_keys_of_other_things(key: str) -> None:
    assert not is_secret(key)
    assert mask_setting(key, "bert-base") == "bert-base"


TEXTS = {
    "postgresql://ann:hunter2@db.example/mlflow": f"postgresql://ann:{MASK}@db.example/mlflow",
    "cannot reach http://u:p@ss:w@host:5000/x, tried": f"cannot reach http://u:{MASK}@host:5000/x, tried",
    "https://host/x?sig=abc%3D&se=2026": f"https://host/x?sig={MASK}&se=2026",
    "python train.py --token abc --lr 0.1": f"python train.py --token {MASK} --lr 0.1",
    "python train.py --api-key=abc --n-keys=3": f"python train.py --api-key={MASK} --n-keys=3",
    "login failed (password='x y')": f"login failed (password='{MASK}')",
    'body {"token": "abc", "tokenizer": "bert"}': f'body {{"token": "{MASK}", "tokenizer": "bert"}}',
    "Authorization: Bearer abcdefgh123": f"Authorization: {MASK} abcdefgh123".replace("abcdefgh123", MASK),
    "ghp_0123456789abcdefghijABCDEFGHIJ failed": f"{MASK} failed",
    "hf_abcdefghijABCDEFGHIJabcd": MASK,
    "AKIAABCDEFGHIJKLMNOP": MASK,
    "PASSWORD: hunter2": f"PASSWORD: {MASK}",
}


@pytest.mark.parametrize("text", TEXTS)
def test_secrets_in_texts(text: str) -> None:
    masked = mask_text(text)
    for secret in (
        "hunter2",
        "p@ss",
        "abc%3D",
        "abcdefgh123",
        "abc --",
        "=abc",
        '"abc"',
        "x y",
        "ghp_",
        "AKIA",
    ):
        assert secret not in masked
    if "Bearer" not in text:
        assert masked == TEXTS[text]


@pytest.mark.parametrize(
    "text",
    [
        "invalid token: expected a number",
        "ValueError: max_tokens=512 is more than tokenizer: bert takes",
        "shape (3, 4) at epoch 2, batch 113; key=value",
        "see https://host:5000/#/experiments/1/runs/0f3c9c1d5e6f4b7a8d9e0f1a2b3c4d5e",
        "sqlite:////home/ann/mlflow.db",
        "git@github.com:ann/project.git at 5d41402abc4b2a76b9719d911017c592deadbeef",
        "token=None, password=None",
        "from 000001234-a1-e2-b113-BATCH_END; lr: 0.1",
    ],
)
def test_texts_without_secrets_stay(text: str) -> None:
    assert mask_text(text) == text


def test_command_lines() -> None:
    words = [
        "python",
        "train.py",
        "--token",
        "abc",
        "--lr",
        "1",
        "HF_TOKEN=abc",
        "--password=x",
        "--max-tokens",
        "5",
    ]
    masked = ["python", "train.py", "--token", MASK, "--lr", "1", f"HF_TOKEN={MASK}", f"--password={MASK}"]
    assert mask_argv(words) == [*masked, "--max-tokens", "5"]
    assert mask_tree({"argv": words, "cwd": "/home"}) == {
        "argv": [*masked, "--max-tokens", "5"],
        "cwd": "/home",
    }


def test_secrets_of_the_environment_are_found_wherever_they_stand() -> None:
    environment = {
        "MY_API_KEY": "correct-horse",
        "TOKENIZER": "bert-base",
        "PASSWORD": "x",
        "PWD": "/home/ann",
    }
    environment |= {"GOOGLE_APPLICATION_CREDENTIALS": "/home/ann/key.json", "SECRET_FILE": "/run/secret"}
    known = secrets_in(environment | {"SECRET_NUMBER": "1234567"})
    assert known == {"correct-horse"}
    assert mask_text("refused correct-horse for bert-base", known) == f"refused {MASK} for bert-base"


names = st.text(string.ascii_letters + string.digits + "_-. =:'\"@/&", max_size=30)
secrets = st.text(string.ascii_letters + string.digits + "_-+.!", min_size=8, max_size=30).map(
    lambda s: f"Z9{s}9Z"
)
trees = st.recursive(
    st.none() | st.booleans() | st.integers() | names,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)


@given(trees)
def test_masking_twice_is_masking_once_and_the_shape_stays(tree: object) -> None:
    once = mask_tree(tree)
    assert mask_tree(once) == once
    assert _shape(once) == _shape(tree)


def _shape(tree: object) -> object:
    if isinstance(tree, dict):
        return {key: _shape(value) for key, value in tree.items()}
    return [_shape(item) for item in tree] if isinstance(tree, list) else type(tree)


@given(st.sampled_from(SECRET_KEYS), secrets, names)
def test_a_secret_is_hidden_in_every_place_that_says_so(key: str, secret: str, other: str) -> None:
    name = key.lstrip("-")
    places = [
        json.dumps(mask_tree({"config": {name: secret, "other": other}})),
        json.dumps(mask_argv(["python", "train.py", f"--{name}", secret, "--lr", "1"])),
        json.dumps(mask_argv(["python", "train.py", f"--{name}={secret}"])),
        mask_text(f"python train.py --{name}={secret} --lr 1"),
        mask_text(f"python train.py --{name} {secret} --lr 1"),
        mask_text(f"failed: {name}={secret!r}"),
        mask_text(f"https://ann:{secret}@host/path"),
        mask_text(other + secret + other, [secret]),
    ]
    for place in places:
        assert secret not in place
