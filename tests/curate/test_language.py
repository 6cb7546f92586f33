"""Languages: by script if that decides, otherwise by the model."""

import pytest
from made_texts import prose

from bessemer.addons.curate.filters import UNKNOWN, language


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (prose(5), "en"),
        ("阿猫阿狗：旧时人们常用的小名。", "zh"),  # the model alone would call many such entries Japanese
        ("嚼处春冰敲齿冷，咽时雪液沃心寒。", "zh"),
        ("我们在 Linux 上运行 Python 程序，然后检查输出的结果是不是正确。", "zh"),
        ("これは日本語の文章です。猫は魚が好きで、毎日たくさん食べています。", "ja"),
        ("Le renard a mangé le fromage que le corbeau tenait dans son bec.", "fr"),
        ("Der Fuchs und der Rabe waren seit vielen Jahren gute Freunde.", "de"),
        ("Лиса и ворон жили в одном лесу и часто спорили.", "ru"),
        ("12 + 3 = 15", UNKNOWN),
    ],
)
def test_language(text, expected):
    code, sure = language(text)
    assert code == expected
    assert 0 < sure <= 1
