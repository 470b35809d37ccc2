"""Recognise refusals and self-descriptions of the model that gave an answer, which a new model should not learn.

There are four kinds. The cleaner filters dumps by them (cleaning/filters/refusals.py), distillation its teachers' answers. The
patterns know nine languages: en, de, es, fr, pt, zh, ja, ko, ru.

    self_identification  "I am ChatGPT, made by OpenAI": untrue of any model trained on the dump
    ai_boilerplate       an answer that opens with "As an AI language model, I …"
    refusal              "I'm sorry, but I cannot open links": a limit of that product, which yours may not have
    policy_refusal       declines something harmful. The cleaner keeps it: a model that is never trained on a "no" never says one

A refusal opens its answer and is most of it. So only the opening of an answer is read, and an answer counts as a refusal
only if it is short. Sentences about refusals, quoted ones, and long answers that apologise first and then help are kept.
"""

import re
from collections.abc import Callable

import ahocorasick_rs

from fastft.data.conversation import Message

# Bytes of UTF-8 (a Chinese sentence has a third of the characters of an English one). That is room for a refusal, its
# reason and an offer of help; longer answers have content of their own.
SHORT = 800
OPENING = 240  # characters of an answer that count as its opening


def _any(*patterns: str) -> re.Pattern:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns))


def _words(words: str) -> Callable[[str], list]:
    """Return a function that finds all of `words` (separated by |) in a text, inside of longer words, too."""
    return ahocorasick_rs.AhoCorasick(words.replace("\n", "").split("|")).find_matches_as_indexes


# In English, "I" must follow closely: "As an AI language model, ChatGPT can …" speaks about the product.
_AS_AN_AI = _any(
    r"(?<![\"“'«])\bas an? (?:(?:responsible|ethical|respectful|helpful|honest|friendly),? (?:and )?)*"
    r"(?:ai\b|artificial intelligence|(?:large )?language model|(?:text|machine|virtual|digital)"
    r"[\w -]{0,20}(?:model|assistant|ai)\b)[^.\n]{0,60}?\b(?:i|i'm|i've|my|me)\b",
    r"\bi(?:'m| am) (?:just |only |merely )?an? (?:ai|artificial intelligence|(?:large )?language model)\b",
    r"(?<![„\"»])\bals (?:ein(?:e|em)? )?(?:ki\b|künstliche intelligenz|(?:großes )?sprachmodell)",
    r"\bich bin (?:nur |lediglich )?ein(?:e)? (?:ki\b|künstliche intelligenz|sprachmodell)",
    r"(?<![«\"“])\bcomo (?:una? )?(?:ia\b|inteligencia artificial|modelo de (?:lenguaje|ia\b)|asistente (?:de ia|virtual))",
    r"\bsoy (?:solo |sólo )?una? (?:ia\b|inteligencia artificial|modelo de lenguaje)",
    r"(?<![«\"“])\ben tant (?:que |qu['’])(?:ia\b|intelligence artificielle|modèle (?:de langage|linguistique|d'ia)|"
    r"assistant (?:ia|virtuel))",
    r"\bje suis (?:juste |seulement )?une? (?:ia\b|intelligence artificielle|modèle (?:de langage|linguistique))",
    r"(?<![«\"“])\bcomo (?:uma? )?(?:ia\b|inteligência artificial|modelo de (?:linguagem|ia\b)|assistente (?:de ia|virtual))",
    r"\bsou (?:apenas )?uma? (?:ia\b|inteligência artificial|modelo de linguagem)",
    r"(?<![“「《])作为(?:一[个名款种台位])?(?:基于[^，。]{1,12}的)?(?:大型|大|ai|人工智能)*"
    r"(?:语言模型|人工智能|ai\b|ai助手|智能助手|聊天机器人|机器人)[^。\n]{0,12}我",
    r"我(?:只)?是(?:一[个名款种台位])?(?:大型|大|ai|人工智能)*(?:语言模型|人工智能|ai\b|聊天机器人)",
    r"(?<!「)(?:ai|人工知能)(?:の)?(?:言語モデル|アシスタント|チャットボット)?(?:である(?:私|ため)|として(?:、|の私)|なので|ですので)",
    r"私は(?:ai|人工知能|(?:大規模)?言語モデル)",
    r"(?<![«\"])\bкак (?:(?:большая )?языковая модель|ии\b|искусственный интеллект|ai\b)",
    r"\bя (?:всего лишь |просто )?[-–—]? ?(?:языковая модель|искусственный интеллект|ии\b)",
    r"(?:저는|나는)[^.\n]{0,20}(?:인공지능|언어 ?모델|ai)[^.\n]{0,10}(?:입니다|이라|이기|이므로|으로서|로서)",
    r"(?:ai|인공지능)(?: ?언어 ?모델)?(?:로서|이기 때문에|이므로)",
)

_MAKERS = (
    r"openai|chat ?gpt|gpt-?[345][\w.]*|anthropic|claude|google bard|\bbard\b|gemini|deepmind|microsoft bing|bing chat|"
    r"文心一言|百度|通义千问|阿里(?:巴巴|云)|讯飞|yandex|яндекс"
)
# All patterns are in the first person; anything else is a text about the product.
_IDENTITY = _any(
    rf"\b(?:i am|i'm|i was|my name is|you can call me|this is)[^.\n]{{0,80}}?\b(?:{_MAKERS})",
    r"\b(?:as|being) (?:chatgpt|gpt-?[345]|claude|bard|bing chat)\b[^.\n]{0,40}?\b(?:i|i'm|my)\b",
    rf"\bas an? [\w -]{{2,40}}(?:developed|trained|created|made|built|designed) by (?:{_MAKERS})[^.\n]{{0,40}}?\bi\b",
    r"\b(?:openai|anthropic) (?:has |have )?(?:created|trained|developed|designed|built) me\b",
    rf"\bich (?:bin|wurde|heiße)\b[^.\n]{{0,80}}?\b(?:{_MAKERS})",
    rf"\b(?:soy|me llamo|fui (?:creado|desarrollado|entrenado))\b[^.\n]{{0,80}}?\b(?:{_MAKERS})",
    rf"\b(?:je suis|je m'appelle|j'ai été (?:créé|développé|entraîné))\b[^.\n]{{0,80}}?\b(?:{_MAKERS})",
    rf"\b(?:eu sou|sou|fui (?:criado|desenvolvido|treinado))\b[^.\n]{{0,80}}?\b(?:{_MAKERS})",
    rf"我(?:是|叫|的名字是|由|被)[^。\n]{{0,30}}?(?:{_MAKERS})",
    rf"作为[^。，\n]{{0,30}}(?:{_MAKERS})[^。，\n]{{0,20}}，?我",
    rf"(?:私|わたし|僕)は[^。\n]{{0,40}}?(?:{_MAKERS})",
    rf"\b(?:я|меня (?:зовут|создал[аи]?|разработал[аи]?))\b[^.\n]{{0,60}}?(?:{_MAKERS})",
    rf"저는[^.\n]{{0,40}}?(?:{_MAKERS})[^.\n]{{0,40}}(?:입니다|모델|이에요|예요|니다)",
)

_SORRY_EN = (
    r"(?:(?:i'm|i am|we're) (?:really |very |so |truly |deeply )?sorry|sorry|i apologi[sz]e|my apologies|apologies|"
    r"unfortunately|regrettably)[^.\n]{0,60}?[,.;:]?\s*(?:but |however,? |as [^,.\n]{2,60}, )*"
)
_CANNOT_EN = (
    r"i(?:'m| am)? (?:still |currently |also )?(?:cannot|can't|can not|won't|will not|(?:currently )?unable to|"
    r"not (?:able|capable|programmed|allowed|permitted|authorized|comfortable|equipped|designed)\b|"
    r"(?:do not|don't) (?:currently )?have (?:the |any |direct |real-?time )*(?:ability|capability|capabilities|access|"
    r"permission|means))"
)
_REFUSAL = _any(
    rf"{_SORRY_EN}{_CANNOT_EN}",
    rf"(?:^|[.!?\n]\s*){_CANNOT_EN} (?:to |directly |actually )*(?:assist|help (?:you )?with|fulfil|comply|provide|"
    r"access|brows|open|generate|create|engage|support|endorse|condone|discuss|respond|answer|participate|promote|"
    r"write|view|read the|perform)",
    r"(?:es tut mir (?:wirklich )?leid|tut mir leid|entschuldig\w*|leider)[^.\n]{0,60}?"
    r"\b(?:kann ich|ich kann|bin ich|ich bin|habe ich|ich habe|darf ich|ich darf)\b[^.\n]{0,80}?"
    r"\b(?:nicht|kein\w*)\b(?! (?:ganz |genau )?(?:sicher|verstehe))",
    r"(?:^|[.!?。！？\n]\s*)ich kann (?:dir|ihnen|euch)?[^.\n]{0,30}(?:nicht|keine?)[^.\n]{0,40}\b(?:helfen|weiterhelfen|"
    r"unterstützen|anbieten|bereitstellen|zugreifen)",
    r"(?:lo siento|lo lamento|disculpa|disculpe|lamentablemente|desafortunadamente|perdón)[^.\n]{0,60}?"
    r"\bno (?:puedo|soy capaz|estoy en condiciones|tengo (?:acceso|la capacidad)|me es posible)",
    r"(?:^|[.!?。！？\n]\s*)no puedo (?:ayudarte|ayudarle|asistir|proporcionar|cumplir|acceder|participar|crear|generar)",
    r"(?:je suis (?:vraiment )?désolée?|désolée?|je m'excuse|malheureusement|je regrette)[^.\n]{0,60}?"
    r"\bje (?:ne peux|ne suis|n'ai|ne saurais|ne dispose)\b[^.\n]{0,30}\b(?:pas|aucun)",
    r"(?:^|[.!?。！？\n]\s*)je ne peux pas (?:vous |t')?(?:aider|assister|fournir|répondre|accéder|satisfaire|participer)",
    r"(?:desculpe|sinto muito|lamento|infelizmente|peço desculpas)[^.\n]{0,60}?"
    r"\bnão (?:posso|consigo|sou capaz|tenho (?:acesso|a capacidade)|me é possível)",
    r"(?:^|[.!?。！？\n]\s*)não posso (?:ajudar|ajudá-l[oa]|fornecer|cumprir|acessar|atender|participar|criar|gerar)",
    r"(?:很抱歉|非常抱歉|抱歉|对不起|不好意思|遗憾)[^。\n您你他她它]{0,40}?"
    r"(?:无法|不能|不可以|没有能力|没有权限|不会(?:提供|协助)|不具备)",
    r"(?:^|[.!?。！？\n]\s*)我(?:无法|不能)(?:提供|协助|帮助|满足|回答|访问|打开|浏览|生成|执行|完成|为您)",
    r"(?:申し訳(?:ありません|ございません)|すみません|恐れ入りますが|残念ながら)[^。\n]{0,80}?"
    r"(?:できません|できかね|お手伝いできません|いたしかねます|お答えできません|ことはできない)",
    r"(?:к сожалению|извините|простите|прошу прощения|мне жаль)[^.\n]{0,60}?"
    r"\b(?:я )?(?:не (?:могу|в состоянии|способ\w+|имею (?:доступа|возможности))|у меня нет (?:доступа|возможности))",
    r"(?:^|[.!?。！？\n]\s*)я не могу (?:помочь|предоставить|выполнить|ответить|открыть|получить доступ|создать)",
    r"(?:죄송(?:합니다|하지만|해요|스럽지만)|미안하지만|유감스럽게도|안타깝게도)[^.\n]{0,80}?"
    r"(?:수 없습니다|수 없어요|수 없|불가능합니다|못합니다|어렵습니다)",
)

# Words that show that the refusal is about the request, not about a missing capability of the product.
_HARM = _any(
    r"\b(?:harm(?:ful|ing)?|illegal|unlawful|unethical|immoral|dangerous|violen(?:t|ce)|offensive|inappropriate|hateful|"
    r"discriminat\w+|explicit|sexual|abusive|malicious|stereotypes?|against (?:my|our|the|openai's) [\w ]{0,20}"
    r"(?:polic\w+|guidelines|principles|programming)|(?:content|use|usage) polic\w+|ethical guidelines)\b",
    r"i(?:'m sorry,? but i)? (?:cannot|can't|can not|am (?:not able|unable) to|'m (?:not able|unable) to) (?:assist with|"
    r"help (?:you )?with|fulfil\w*|comply with|engage in) (?:that|this|your|such)(?: (?:request|type of request))?\s*[.!]",
    r"\b(?:illegal|schädlich|gefährlich|unethisch|gewalt\w*|anstößig|unangemessen)\w*",
    r"\b(?:ilegal|dañin[oa]|peligros[oa]|poco étic[oa]|violen(?:to|cia)|ofensiv[oa]|inapropiad[oa])\w*",
    r"\b(?:illéga(?:l|ux)|nuisible|dangereu(?:x|se)|contraire à l'éthique|violen(?:t|ce)|offensant|inapproprié)\w*",
    r"\b(?:prejudicia(?:l|is)|perigos[oa]|antiétic[oa]|violência|ofensiv[oa]|inadequad[oa]|nociv[oa])\w*",
    r"违法|非法|有害|危险|不道德|暴力|色情|歧视|不当|违反|伦理",
    r"違法|有害|危険|非倫理|暴力|不適切|差別",
    r"незаконн|вредн|опасн|неэтичн|насили|оскорбительн|неприемлем|противозаконн",
    r"불법|유해|위험|비윤리|폭력|부적절|차별|윤리",
)


# "Write the first chapter of a book about an evil ChatGPT, in the first person": there "I am ChatGPT" is a character's line.
# A question must ask for both, fiction and such a speaker, because a plain story may be declined with "I am made by OpenAI".
_FICTION = _any(
    r"\b(?:story|stories|novel|chapter|poem|song|lyrics|rap|script|screenplay|scene|monologue|dialogue|diary|fan ?fiction)\b",
    r"\b(?:geschichte|roman|kapitel|gedicht|lied|szene|drehbuch|monolog)\b",
    r"\b(?:historia|cuento|novela|capítulo|poema|canción|guion|escena|conto|história|romance|canção|roteiro|cena)\b",
    r"\b(?:histoire|conte|roman|chapitre|poème|chanson|scénario|scène)\b",
    r"小说|故事|[第一首].{0,2}章|诗|歌词|剧本|独白|日记|物語|小説|詩|脚本|소설|이야기|대본|рассказ|роман|глав[аыу]|стих|песн|сценари",
)
_SOMEBODY = _any(
    _MAKERS,
    r"\b(?:first[- ]person|(?:perspective|point of view|voice|eyes) of|robot|chat ?bot|ai\b)",
    r"\b(?:ich-?perspektive|ich-?form|primera persona|primeira pessoa|première personne|ki|ia)\b",
    r"第一人称|视角|机器人|人工智能|一人称|ロボット|1인칭|로봇|от первого лица|робот",
)


# Every text that the patterns match contains one of these words, so the words are searched for first. For 240 characters the
# 20 patterns take 60 µs, the one pattern of what triggers them 16 µs, and these words, all at once, 1 µs (3 to 10 with `in`).
_AS_WORDS = _words("""as a|i am|i'm|als |ich bin|como |soy |en tant |je suis|sou |作为|我|である|として|なので|ですので|私は|как
|я |저는|나는|로서|이기 때문에|이므로""")
_REFUSAL_WORDS = _words("""sorry|apolog|unfortunately|regrettably|cannot|can't|can not|won't|will not|unable|not able|not capable
|not programmed|not allowed|not permitted|not authorized|not comfortable|not equipped|not designed|do not|don't
|leid|entschuldig|ich kann|lo siento|lo lamento|disculp|lamentablemente|desafortunadamente|perdón|no puedo
|désolé|je m'excuse|malheureusement|je regrette|je ne peux|desculp|sinto muito|lamento|infelizmente|não posso
|抱歉|对不起|不好意思|遗憾|我无法|我不能|申し訳|すみません|恐れ入り|残念|сожалению|извините|простите|прощения|жаль|не могу
|죄송|미안|유감|안타깝""")
_AI_TRIGGER = re.compile(
    r"(?<![a-zа-я])(?:ai|ia|ki|ии)(?![a-zа-я])|artificia|artificiel|künstlich|model|modèle|искусств|языков|人工|语言模型|机器人|助手"
    r"|言語モデル|인공지능|언어|(?:text|machine|virtual|digital)[\w -]{0,20}assistant|asistente|assistente|assistant"
)
_NEGATION = re.compile(
    r"n't|not|unable|nicht|kein|\bno\b|\bne |\bn'|não|无法|不|没有|できません|できかね|いたしかねます|не |нет |없|불가능"
    r"|못합|어렵"
)
_MAKER_WORDS = _words("openai|gpt|anthropic|claude|bard|gemini|deepmind|bing|文心|百度|通义|阿里|讯飞|yandex|яндекс")


def _opening(message: Message) -> str:
    """Return the opening of an answer as the patterns expect it, in lower case with straight quotes; "" for other turns."""
    if message.role != "assistant":
        return ""
    return message.content.lstrip(" \t\r\n*_#>")[:OPENING].replace("’", "'").lower()


def _is_short(message: Message) -> bool:
    return len(message.content) <= SHORT and len(message.content.encode("utf-8", "replace")) <= SHORT


def self_identification(message: Message) -> str | None:
    """Complain about an answer in which the model says which company's product it is."""
    opening = _opening(message)
    found = _MAKER_WORDS(opening) and _IDENTITY.search(opening)
    return f"says {_shown(found)}" if found and _own_words(message, found) else None


def asks_for_somebodys_words(question: str) -> bool:
    """Tell whether a question asks for a text in which "I am ChatGPT" is a character's line."""
    question = question[:2_000].lower()
    return _FICTION.search(question) is not None and _SOMEBODY.search(question) is not None


def ai_boilerplate(message: Message) -> str | None:
    """Complain about an answer that opens with "As an AI language model, I …" and does not decline something harmful."""
    opening = _opening(message)
    perhaps = _AS_WORDS(opening) and _AI_TRIGGER.search(opening)
    found = perhaps and _AS_AN_AI.search(opening)
    if found and found.start() <= OPENING // 2 and _own_words(message, found) and not _declines_harm(message):
        return f"opens with {_shown(found)}"
    return None


def refusal(message: Message) -> str | None:
    """Complain about a short answer that says what the product cannot do."""
    found = _refuses(message)
    return f"refuses: {_shown(found)}" if found and not _declines_harm(message) else None


def policy_refusal(message: Message) -> str | None:
    """Complain about a short answer that declines something harmful."""
    found = _refuses(message)
    return f"declines: {_shown(found)}" if found and _declines_harm(message) else None


def _refuses(message: Message) -> re.Match | None:
    """Return the refusal with which a short answer, or its second sentence, begins; None if there is none."""
    opening = _opening(message)
    if not opening or not _is_short(message):
        return None
    perhaps = _REFUSAL_WORDS(opening) and _NEGATION.search(opening)
    found = perhaps and _REFUSAL.search(opening)
    return found if found and found.start() <= 80 and _own_words(message, found) else None


def _declines_harm(message: Message) -> bool:
    return _refuses(message) is not None and _HARM.search(message.content[:SHORT].replace("’", "'").lower()) is not None


def _own_words(message: Message, found: re.Match) -> bool:
    """Tell whether the words are the model's own, and not quoted, code, or part of a text that was asked for (a letter)."""
    before = found.string[: found.start()]
    quoted = before.count('"') % 2 or before.count("`") % 2 or before.count("“") > before.count("”")
    quoted = quoted or before.count("「") > before.count("」") or before.count("«") > before.count("»")
    quoted = quoted or re.search(r"\bas an? (?:fictional|imaginary|made-up) |作为一?[个名]?虚构", before) is not None
    return not quoted and not re.search(r"(?:^|\n)[^\n.!?]{1,30}(?::\s|：)|(?:^|\n)dear |\n\n[\s\S]*\n\n", before)


def _shown(found: re.Match) -> str:
    return repr(found[0][:60].strip())
