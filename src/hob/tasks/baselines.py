"""What a head has to beat without any language model: TF-IDF and logistic regression, scikit-learn's own, C by
cross-validation."""

from __future__ import annotations

import warnings

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline

from hob.heads.parts import plain


def tfidf(texts: list[str], labels: list[str], others: list[str]) -> list[str]:
    """Answers for `others`. Words and pairs of words, balanced classes, marks of a text taken out."""
    pipeline = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(class_weight="balanced", max_iter=500),
    )
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    search = GridSearchCV(pipeline, {"logisticregression__C": [1.0, 10.0, 100.0]}, scoring="f1_macro", cv=folds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a rare label may be missing from a fold
        search.fit([plain(text) for text in texts], labels)
    return [str(answer) for answer in search.predict([plain(text) for text in others])]
