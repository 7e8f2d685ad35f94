"""Grammars that a text must follow, and which tokens may go on with it.

====================  =========================================================================
`engine.grammar...`
====================  =========================================================================
``gbnf``              the notation of llama.cpp to rules over code points
``json_schema``       a JSON schema to a grammar; ``json_text``: its literals and patterns
``matcher``           `TokenTable`, the vocabulary's bytes; `GrammarMatcher`, one text on its way
====================  =========================================================================

Every sampler loads this package; ``json_schema`` is loaded by those who have a schema.
"""

from engine.grammar.gbnf import Grammar, GrammarError, parse_grammar
from engine.grammar.matcher import GrammarMatcher, TokenTable

__all__ = [
    "Grammar",
    "GrammarError",
    "GrammarMatcher",
    "TokenTable",
    "parse_grammar",
]
