"""Text to token ids and back, as a model file's metadata says.

``vocab`` checks the metadata; ``special`` cuts whole tokens out of a text; what is left goes
through ``spm``, or through ``pretokenize`` and ``bpe``; both join symbols in ``merge``. ``stream``
turns the bytes of pieces into text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from engine.errors import DataError
from engine.tokenizer.bpe import BYTE_TO_TEXT, BpeEncoder, text_to_bytes
from engine.tokenizer.pretokenize import pre_tokenizer
from engine.tokenizer.special import ALWAYS_CUT, CUT_WHEN_PARSED, SpecialCutter
from engine.tokenizer.spm import SPACE_MARK, SpmEncoder
from engine.tokenizer.stream import StreamDecoder
from engine.tokenizer.vocab import TokenType, Vocabulary, read_vocabulary

__all__ = ["StreamDecoder", "TokenType", "Tokenizer"]

# Texts that end a turn. The first list counts whatever the file calls the token, since older files
# call some of them normal; the second only where the file calls it control or user defined.
_END_OF_TURN = (b"<|eot_id|>", b"<|im_end|>", b"<|end|>", b"<end_of_turn>", b"<|endoftext|>")
_END_IF_SPECIAL = frozenset(
    text.encode()
    for text in (
        "<|return|> <|call|> <|calls|> <|flush|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] "
        "<|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> "
        "<\uff5cend\u2581of\u2581sentence\uff5c> [e~["
    ).split()
)
_END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
_UNKNOWN_PIECE = "\u2585".encode()


class Tokenizer:
    """A model's vocabulary with its algorithm.

    Attributes
    ----------
    n_vocab : int
        Number of tokens.
    bos_id, eos_id, eot_id, eom_id, unknown_id : int
        Special tokens, −1 where there is none.
    add_bos, add_eos : bool
        What `encode` adds when asked for special tokens.
    declares_bos : bool
        Whether the file, or for SPM its silence, says that texts begin with BOS. Differs from
        `add_bos` for BPE files that do not say: those get a BOS all the same, but nothing that is
        done for the sake of a BOS (keeping it when the context shifts, say) is done for theirs.
    add_space_prefix : bool
        SPM puts a space in front of a text, and behind each special token.
    warnings : list of str
        What was ignored or assumed while reading, one line each, for the command to print.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._encoder: SpmEncoder | BpeEncoder
        self.is_spm = vocabulary.model == "llama"
        if self.is_spm:
            self._encoder = SpmEncoder(vocabulary)
        else:
            splitter = pre_tokenizer(vocabulary.pre, vocabulary.source)
            self._encoder = BpeEncoder(vocabulary, splitter)
        self.n_vocab = len(vocabulary.texts)
        self.bos_id = vocabulary.special_ids["bos"]
        self.eos_id = vocabulary.special_ids["eos"]
        self.eot_id = self._find_special("eot", _END_OF_TURN)
        self.eom_id = self._find_special("eom", (b"<|eom_id|>",))
        self.unknown_id = vocabulary.special_ids["unknown"]
        self.add_bos = vocabulary.add_bos is not False
        self.add_eos = vocabulary.add_eos is True
        self.declares_bos = self.is_spm if vocabulary.add_bos is None else vocabulary.add_bos
        self.add_space_prefix = self.is_spm and vocabulary.add_space_prefix is not False
        self.warnings = list(vocabulary.warnings)
        self._pieces: list[bytes | None] = [None] * self.n_vocab

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], source: str) -> Tokenizer:
        """Make the tokenizer that a model file describes.

        Parameters
        ----------
        metadata : mapping
            Key to value as `engine.gguf` reads them.
        source : str
            Name of the file, for messages.

        Raises
        ------
        FormatError
            If the tokenizer is of an unknown kind or its keys are not sound; names file and key.
        """
        return cls(read_vocabulary(metadata, source))

    def encode(
        self, text: bytes | str, *, add_special: bool = False, parse_special: bool = False
    ) -> list[int]:
        """Turn a text into token ids.

        Parameters
        ----------
        text : bytes or str
            Bytes need not be valid UTF-8. Characters that `os.fsdecode` made of stray bytes become
            those bytes again.
        add_special : bool
            Add BOS and EOS as the model wants them.
        parse_special : bool
            Recognize control tokens that are written in the text, such as ``<s>``. User-defined
            tokens are always recognized.

        Raises
        ------
        DataError
            If the vocabulary has neither a token for some byte nor an unknown token.
        """
        data = _to_bytes(text) if isinstance(text, str) else text
        ids: list[int] = []
        if add_special and self.add_bos and self.bos_id >= 0:
            ids.append(self.bos_id)
        follows_text = False
        cutter = self._parsing_cutter if parse_special else self._plain_cutter
        for part in cutter.cut(data):
            if isinstance(part, int):
                ids.append(part)
                follows_text = False
                continue
            prefix = b" " if self.add_space_prefix and not follows_text else b""
            ids += self._encoder.encode(prefix + part)
            follows_text = True
        if add_special and self.add_eos and self.eos_id >= 0:
            ids.append(self.eos_id)
        return ids

    def decode(self, tokens: Iterable[int], special: bool = False) -> bytes:
        """Turn a whole sequence back into bytes.

        The space that `encode` put in front of the text is dropped again. For a stream, join
        pieces instead.
        """
        tokens = list(tokens)
        pieces = [self.piece(token, special) for token in tokens]
        if pieces and self.add_space_prefix:
            first = 1 if tokens[0] == self.bos_id and len(tokens) > 1 else 0
            pieces[first] = pieces[first].removeprefix(b" ")
        return b"".join(pieces)

    def piece(self, token: int, special: bool = False) -> bytes:
        """Bytes that a token stands for; they may end inside of a character.

        Parameters
        ----------
        token : int
        special : bool
            Show control tokens by their text instead of by nothing.

        Raises
        ------
        DataError
            If the id is outside of the vocabulary.
        """
        if not 0 <= token < self.n_vocab:
            raise DataError(
                f"{self._vocabulary.source}: token {token} is outside of the {self.n_vocab} tokens"
            )
        if not special and self._vocabulary.types[token] == TokenType.CONTROL:
            return b""
        piece = self._pieces[token]
        if piece is None:
            piece = self._pieces[token] = self._make_piece(token)
        return piece

    def is_eog(self, token: int) -> bool:
        """Whether a token ends generation."""
        return token in self.eog_ids

    @cached_property
    def eog_ids(self) -> frozenset[int]:
        """Ids that end generation: of EOS and its kin, and of texts that models end turns with."""
        vocabulary = self._vocabulary
        ids = {vocabulary.special_ids[name] for name in _END_KEYS} | {self.eot_id, self.eom_id}
        ids |= {vocabulary.ids[text] for text in _END_OF_TURN if text in vocabulary.ids}
        special = vocabulary.ids_of_type(TokenType.CONTROL, TokenType.USER_DEFINED)
        ids |= {token for token in special if vocabulary.texts[token] in _END_IF_SPECIAL}
        return frozenset(ids - {-1})

    @cached_property
    def newline_id(self) -> int:
        """Token of a line feed, which the repetition penalties leave alone; −1 if there is none."""
        ids = self._vocabulary.ids
        texts = (b"<0x0A>", b"\n") if self.is_spm else (BYTE_TO_TEXT[ord("\n")],)
        return next((ids[text] for text in texts if text in ids), -1)

    @cached_property
    def max_token_bytes(self) -> int:
        """Largest length in bytes of a token's text as stored: a space mark counts 3."""
        return max(map(len, self._vocabulary.texts))

    @cached_property
    def _plain_cutter(self) -> SpecialCutter:
        return SpecialCutter(self._vocabulary, ALWAYS_CUT)

    @cached_property
    def _parsing_cutter(self) -> SpecialCutter:
        return SpecialCutter(self._vocabulary, CUT_WHEN_PARSED)

    def _find_special(self, name: str, texts: tuple[bytes, ...]) -> int:
        token = self._vocabulary.special_ids[name]
        if token >= 0:
            return token
        ids = self._vocabulary.ids
        return min((ids[text] for text in texts if text in ids), default=-1)

    def _make_piece(self, token: int) -> bytes:
        text = self._vocabulary.texts[token]
        kind = self._vocabulary.types[token]
        if kind == TokenType.NORMAL:
            return text.replace(SPACE_MARK, b" ") if self.is_spm else text_to_bytes(text)
        if kind in (TokenType.USER_DEFINED, TokenType.CONTROL):
            return text
        if kind == TokenType.BYTE:
            return bytes([int(text[3:5], 16)])
        if kind == TokenType.UNKNOWN and self.is_spm:
            return _UNKNOWN_PIECE
        return b""


def _to_bytes(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
