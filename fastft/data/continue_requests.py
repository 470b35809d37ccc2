"""Recognise questions that say nothing but "continue": they ask for the rest of the answer before them.

    is_continue("Please continue from where you left off.")    # True
    is_continue("Continue the story with a dragon")            # False: a question of its own

Without that answer such a question means nothing. So the filters drop the first round of a dialogue if its question is one,
and join the two halves of an answer around one (cleaning.filters.structure). The splitter begins no part with one
(fastft.data.split).
"""

import re
import unicodedata

LONGEST = 60  # characters; a longer turn says more

# Combining marks, such as the vowel signs of Hindi, are parts of words.
_BETWEEN_WORDS = re.compile(r"[^\w'\u0300-\u036f\u0900-\u0963]+")

_CONTINUE = re.compile(
    # English
    r"(?:(?:please|pls|plz|ok|okay|yes|yeah|sure|great|good|perfect|thanks|thank you|and|now|then|(?:can|could) you) )*"
    r"(?:next|more|(?:cont|contiune|continue|go on|go ahead|carry on|proceed|resume|finish|keep (?:going|writing|generating))"
    r"(?: (?:writing|generating|it))?(?: (?:with )?(?:your|the|previous|last| )+(?:answer|response|reply))?"
    r"(?: (?:from )?(?:where|there)(?: (?:you|u|it|we) .{0,30})?)?)"
    r"(?: (?:please|pls|plz|now|thanks|thank you))*"
    # German
    r"|(?:(?:ok|ja|bitte|und) )*(?:(?:mach |schreib |schreibe )?weiter|fortfahren|fortsetzen|fahre? (?:bitte )?fort)(?: bitte)?"
    # Spanish, Portuguese, Italian
    r"|(?:(?:ok|sí|si|sim|por favor|per favore) )*(?:sigue|siga|adelante|continua|continúa|continúe|continue|continuar|"
    r"prossiga|prosseguir|prosigue|prosegui|vai avanti|continua a scrivere|contin[uú]a escribiendo|continue escrevendo|"
    r"sigue escribiendo)(?: (?:por favor|per favore))?"
    # French
    r"|(?:(?:ok|oui|stp|svp) )*(?:continue[rz]?|poursuis|poursuivez|vas y|la suite)(?: (?:s'il (?:te|vous) pla[iî]t|stp|svp))?"
    # Chinese, Japanese, Korean
    r"|(?:请|請|好的?|那|你|再| )*(?:继续|繼續|接着|接著|往下)(?:写|寫|说|說|写下去|下去|输出|輸出|生成|回答|吧| )*"
    r"|(?:続けて|つづけて)(?:ください|下さい)?|続き(?:を(?:お願いします|書いて(?:ください)?|教えて(?:ください)?)?)?"
    r"|계속(?: ?해 ?줘| ?해 ?주세요| ?하세요| ?해| ?써 ?줘)?|이어서(?: ?(?:작성)?해 ?(?:줘|주세요))?"
    # Russian, Ukrainian, Polish, Turkish, Indonesian, Vietnamese, Arabic, Hindi
    r"|(?:пожалуйста )?(?:продолж(?:ай|айте|и|ить)|дальше|далее|продовжуй)(?: (?:пожалуйста|писать))?"
    r"|kontynuuj|devam(?: et| ediniz)?|lanjut(?:kan)?|tiếp(?: tục)?|(?:أكمل|استمر|تابع)(?: من فضلك)?|(?:कृपया )?जारी रखें"
)


def is_continue(text: str) -> bool:
    """Tell whether a turn, as a whole, only asks for the rest; punctuation and case do not matter."""
    if not text or len(text) > LONGEST:
        return False
    words = _BETWEEN_WORDS.sub(" ", unicodedata.normalize("NFC", text).casefold().replace("’", "'")).strip(" '")
    return _CONTINUE.fullmatch(words) is not None
