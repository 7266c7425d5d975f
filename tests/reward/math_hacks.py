"""Answers that only look right, and right ones that look like them: one on a line, `answer ~ reference`, in a box."""

WRONG = {
    "operations that nobody carried out": r"""
\int_0^1 3x^2 dx ~ 1
\sum_{k=1}^{10} k ~ 55
\prod_{k=1}^5 k ~ 120
\lim_{x\to 0} \frac{\sin x}{x} ~ 1
\sum_{n=1}^\infty \frac{1}{n^2} ~ \frac{\pi^2}{6}
\frac{d}{dx}x^2 ~ 2x
\int 2x dx ~ x^2
7^{100} \mod 4 ~ 1
\gcd(12, 18) ~ 6
\max(5, 4) ~ 5
""",
    "conditions in place of values": r"""
x^2=4 ~ 4
2x=10 ~ 10
x+1=6 ~ 6
3+x=5 ~ 5
x^2+y^2=1 ~ 1
1==1 ~ 1
f(x+1)=5 ~ 5
""",
    "what a parser leaves out, joins or takes for a unit": r"""
5t ~ 5
5m ~ 5
5ab ~ 5
5' ~ 5
x' ~ x
45' ~ 45
5... ~ 5
0.333... ~ 0.333
5 6 ~ 56
1 23 ~ 123
1 2 3 ~ 123
1 1/2 ~ 11/2
11/2 ~ 1 1/2
5\,dx ~ 5
101_2 ~ 101_3
5_1 ~ 5
0,234 ~ 234
""",
    "words that change a number": r"""
5 in 6 ~ 5
5 minus x ~ 5
5 squared ~ 5
5 factorial ~ 5
5 halves ~ 5
5 thirds ~ 5
5 below zero ~ 5
5 negative ~ 5
5 modulo seven ~ 5
5 base six ~ 5
5 at most ~ 5
5 if x ~ 5
5 is wrong ~ 5
5 is not the answer ~ 5
5\text{ because }x ~ 5
\text{5 or 6} ~ 5
5以上 ~ 5
5이상 ~ 5
""",
    "other units": r"""
10 am ~ 10 pm
5:30 pm ~ 5:30 am
5 EUR ~ 5 USD
5 pence ~ £5
20°C ~ 20°F
""",
    "other shapes": r"""
[1,2] ~ 1,2
1,2 ~ [1,2]
(1,2] ~ 1,2
\{\varnothing\} ~ \varnothing
\{\{1\}\} ~ 1
\{\{1\},\{2\}\} ~ \{1,2\}
(b,a)=(1,2) ~ a=1,b=2
(1.234,5) ~ 1234.5
(A) (B) ~ B
(A) B ~ B
ABC ~ ACB
]1,2[ ~ [1,2]
0.000000 ~ 1/10000001
0.000012 ~ 1.21 \cdot 10^{-5}
""",
}

RIGHT = {
    "operations": r"""
\int_0^1 3x^2 dx = 1 ~ 1
\int_0^1 x dx ~ \int_0^1 x dx
2^{10} ~ 1024
0*x+5 ~ 5
""",
    "names of values": r"""
m+n=5 ~ 5
5=x ~ 5
P(X=2)=1/4 ~ 1/4
\frac{dy}{dx}=2x ~ 2x
f'(x)=2x ~ 2x
(x,y)=(1,2) ~ x=1, y=2
""",
    "numbers": r"""
1.234,5 ~ 1234.5
1.234.567 ~ 1234567
1.234.567,8 ~ 1234567.8
1 234 ~ 1234
1 234 567 ~ 1234567
1 234,5 ~ 1234.5
1’234 ~ 1234
12,34,567 ~ 1234567
€1.234,50 ~ 1234.5
FF_{16} ~ ff_{16}
0.000001 ~ 10^{-6}
٥ ~ 5
""",
    "words and units": r"""
18 dollars in total ~ 18
7 more apples ~ 7
5 times as many ~ 5
20 feet long ~ 20
1/2 of the pie ~ 0.5
25% off ~ 25
21st ~ 21
10 a.m. ~ 10 am
10:30 A.M. ~ 10:30 am
20°C ~ 20 degrees Celsius
30° ~ 30°C
£0.50 ~ 50 pence
""",
    "shapes and spellings": r"""
]1,2[ ~ (1,2)
[1,2[ ~ [1,2)
[1,2,3] ~ 1,2,3
x\in\mathbb R ~ (-\infty,\infty)
ln(2) ~ \ln 2
\nicefrac{1}{2} ~ 1/2
\textcolor{red}{5} ~ 5
\underline{5} ~ 5
5\\ ~ 5
""",
}


def pairs(lines: str) -> list[tuple[str, str]]:
    """Answer and reference of each line."""
    return [(answer, reference) for answer, _, reference in (line.partition(" ~ ") for line in lines.strip().splitlines())]
