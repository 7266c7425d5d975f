"""Forms that let a guess pass, and the questions that look like one and are none."""

import pytest

from tandem.engine.curate.form import excluded_form


def form_of(question: str, answer: str = "12") -> str | None:
    found = excluded_form(question, answer)
    return found[0] if found is not None else None


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is 7 + 8? A) 14 B) 15 C) 16 D) 17", "15"),
        ("What is 7 + 8?\n(A) 14\n(B) 15\n(C) 16", "15"),
        ("What is 7 + 8?\nA. 14\nB. 15\nC. 16\nD. 17", "15"),
        ("What is $7+8$? $\\textbf{(A) } 14 \\qquad \\textbf{(B) } 15 \\qquad \\textbf{(C) } 16$", "15"),
        ("What is $7+8$? $\\text{(A)}\\ 14\\quad\\text{(B)}\\ 15\\quad\\text{(C)}\\ 16$", "15"),
        ("（A）14 （B）15 （C）16 （D）17 中哪个最大", "17"),
        ("Which of the following is closest to 2023?", "2025"),
        ("Which one of these statements holds for every n?", "n > 0"),
        ("Select all the statements that hold.", "1 and 3"),
        ("A number is prime, odd, or none of the above. What is 91?", "odd"),
        ("The chemical symbol of carbon is", "C"),
        ("The largest one is", "\\textbf{(D)}"),
        ("3의 배수는?", "②"),
        ("다음 중 가장 큰 수는?", "9"),
        ("옳은 것을 모두 고르시오.", "9"),
        ("<보기>에서 소수의 개수를 구하라", "9"),
        ("下列说法正确的是", "x>1"),
        ("以下哪个数最大?", "9"),
        ("三角形的边长是 ① 3 ② 4 ③ 5 ④ 6", "5"),
    ],
)
def test_multiple_choice_is_excluded(question: str, answer: str) -> None:
    assert form_of(question, answer) == "multiple_choice"


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("True or false: 91 is prime.", "false"),
        ("Is 91 prime (T/F)?", "it is not"),
        ("Is 91 a prime number?", "No"),
        ("Does the series converge?", "\\text{Yes}"),
        ("Decide whether the following statement holds: all primes are odd.", "it fails for two"),
        ("Are the following claims correct?", "neither"),
        ("Is 4 even?", "$\\textbf{True}$"),
        ("모든 소수는 홀수인가?", "아니오"),
        ("다음 명제의 참과 거짓을 말하여라.", "둘 다 성립"),
        ("소수는 모두 홀수이다. (O/X)", "X"),
        ("判断对错:零是偶数。", "对"),
        ("零是偶数,这个说法是否正确?", "这个说法是成立的"),
        ("零是偶数吗?", "是"),
    ],
)
def test_true_or_false_is_excluded(question: str, answer: str) -> None:
    assert form_of(question, answer) == "true_false"


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Prove that there are infinitely many primes.", "infinitely many"),
        ("Let n be odd. Prove: n^2 is odd.", "n^2"),
        ("Let n be odd, and show that 8 divides n^2 - 1.", "8"),
        ("(a) Show that f is continuous.", "f"),
        ("Disprove that all primes are odd.", "2"),
        ("Verify that 2 is a root.", "2"),
        ("Give a proof of the binomial theorem.", "x"),
        ("Use induction to prove that the sum is n(n+1)/2.", "n(n+1)/2"),
        ("What follows for the sum of two odd numbers?", "Q.E.D."),
        ("What follows for the sum?", "See solution"),
        ("두 홀수의 합이 짝수임을 보이시오.", "짝수"),
        ("다음을 증명하여라.", "풀이 참조"),
        ("求证:两个奇数的和是偶数。", "偶数"),
        ("设 n 为奇数。请证明 n^2 是奇数。", "n^2"),
        ("两个奇数的和是什么数?", "证明略"),
    ],
)
def test_proofs_are_excluded(question: str, answer: str) -> None:
    assert form_of(question, answer) == "proof"


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("If P(A) = 0.5, P(B) = 0.4 and P(C) = 0.2, find P(A and B and C).", "0.04"),
        ("Points (0, A), (1, B) and (2, C) lie on a line. Find A + B + C.", "6"),
        ("Let A, B and C be points with AB = 3 and BC = 4. Find AC.", "5"),
        ("Consider (a) the sum and (b) the product and (c) the quotient of 6 and 3. Add them.", "29"),
        ("The first option costs $50 and the second $60. If Leila wants to choose the first option, how much does she save?", "10"),
        ("On a true or false quiz with 12 questions, Ann gets 9 right. How many does she get wrong?", "3"),
        ("Bob wants to prove that he can run 3 miles in 24 minutes. How long may each mile take?", "8"),
        ("It can be shown that the limit exists. Find it.", "1"),
        ("They show that movie 3 times a day. How often is that in a week?", "21"),
        ("条件①x>1 ②x<9 ③x是质数,求x的个数", "4"),
        ("可以证明该数列收敛。求其极限。", "1"),
        ("他需要3份证明书,每份5元。一共多少元?", "15"),
        ("다음 방정식을 풀어라. 2x = 6", "3"),
        ("下列方程的解为多少? 2x = 6", "3"),
        ("Which side of the street is the house with number 7 on?", "right"),
        ("Solve for the unknown.", "x"),
        ("How many solutions are there?", "No"),
    ],
)
def test_what_only_looks_like_such_a_form_stays(question: str, answer: str) -> None:
    assert excluded_form(question, answer) is None


@pytest.mark.parametrize("piece", ["(A) ", "which of ", "A) ", "下列", "prove ", "true or ", "use ", "\\text{", "(", "choose the "])
def test_the_rules_take_linear_time(piece: str) -> None:
    import time

    def seconds(num: int) -> float:
        started_s = time.process_time()
        excluded_form(piece * num, "12")
        return time.process_time() - started_s

    seconds(200)
    assert seconds(20_000) < 100 * max(seconds(2000), 1e-3)  # ten times the text: a hundred times would be quadratic
