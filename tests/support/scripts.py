"""Words of twenty scripts, and texts made of them."""

from __future__ import annotations

import random

WORDS = (
    "The quick brown fox jumps over the lazy dog; it's 12,345.67 (or 8e-9)! http://example.com/a?b=c",
    "Schöne Grüße aus Köln, wo die Straßenbahn fährt", "¿Dónde está la señora Núñez?", "Où est l'élève à l'œuvre",
    "Съешь же ещё этих мягких французских булок", "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία", "Ճամփա ուր, խոսքեր", "ქართული ენა მშვენიერია",
    "דג סקרן שט בים מאוכזב", "نص حكيم له سر قاطع وذو شأن عظيم", "ऋषियों को सताने वाले दुष्ट राक्षसों", "আমি বাংলায় গান গাই",
    "யாமறிந்த மொழிகளிலே தமிழ்மொழி", "ஆ", "తెలుగు భాష", "ಕನ್ನಡ ನುಡಿ", "മലയാളം അക്ഷരങ്ങൾ", "ภาษาไทยไม่มีช่องว่าง", "ພາສາລາວ", "မြန်မာဘာသာ",
    "ភាសាខ្មែរ", "አማርኛ ፊደል", "敏捷的棕色狐狸跳过懒狗", "いろはにほへと ちりぬるを カタカナ", "키스의 고유조건은 입술끼리", "ᠮᠣᠩᠭᠣᠯ",
    "🎉👩‍👩‍👧 e\u0301 ﬁ ½ Ⅷ",
    "def f(x):\n\treturn {'a': [1, 2]}  # comment\r\n", "   \n\n  ", "<s> [INST] </s>", "ｆｕｌｌ　ｗｉｄｔｈ",
)  # fmt: skip


def texts(count: int, seed: int = 0) -> list[str]:
    """``count`` texts: pieces of one to four of the words, cut anywhere, joined by blanks of all kinds."""
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        pieces = []
        for _ in range(chance.randint(1, 4)):
            word = chance.choice(WORDS)
            start = chance.randrange(len(word))
            pieces.append(word[start : start + chance.randint(1, 40)])
        found.append(chance.choice(("", " ", "  ", "\n", ". ")).join(pieces))
    return found
