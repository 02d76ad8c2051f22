"""Made-up errands in a shop: orders that the stock allows or not, and cancellations, with demonstrations in two manners."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from random import Random
from typing import Any

from domains.procedural import draw_tasks, is_careful, split_of
from domains.types import Demonstration, Message, Prompt

SYSTEM = (
    "You run a shop. Sell only what is in stock. Tell the order id and the total. "
    "If the stock is too low, order nothing and tell the product id and the stock. "
    "For a cancelled order, tell the order id and the refund."
)
_VALUABLE = ("cameras", "phones")
_PRODUCTS = (*_VALUABLE, "bags", "books", "chairs", "lamps")
_NAMES = ("Ada", "Ben", "Eva", "Ida", "Kim", "Lea", "Max", "Tom")
_ORDERING = ("Order {n} {product} for {name}.", "Sell {n} {product} to {name}.", "{name} wants {n} {product}.")
_REFUND = "Refund {name}'s order."
_CANCELLING = (_REFUND, "Cancel {name}'s order.", "{name} cancels the order.")


@dataclass(frozen=True)
class _Level:
    """How hard the errands of one difficulty are: the largest quantity and stock, the range of ids, the largest price."""

    quantity: int
    ids: range
    price: int


_LEVELS = {1: _Level(5, range(1, 10), 5), 2: _Level(60, range(100, 990), 30), 3: _Level(600, range(1000, 9990), 300)}
_SHOWN = 3
"""Customers and products in a shop."""


def _tool(name: str, /, **properties: str) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in properties.items()},
        "required": list(properties),
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [
    _tool("find_customer", name="string"),
    _tool("find_product", name="string"),
    _tool("place_order", customer_id="integer", product_id="integer", quantity="integer"),
    _tool("cancel_order", order_id="integer"),
]
"""The tools' schemas as the model is shown them."""
_RESULT_PIECES = [
    '{"customer_id": ', ', "orders": [', ', "orders": []}', "]}", '{"product_id": ', ', "price": ', ', "stock": ', '{"order_id": ',
    ', "total": ', '{"refund": ',
]  # fmt: skip


def schema_block() -> str:
    """Return the tools' schemas as they stand in the prompt, one a line."""
    return "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in TOOLS)


@dataclass(frozen=True)
class _Errand:
    """A shop and what somebody wants in it.

    Attributes:
        wish: `order` or `cancel`.
        database: as `agent_server.Shop` takes it.
        customer, product: the rows meant; for a cancellation, the product of the order.
        quantity: wanted, or ordered before.
    """

    wish: str
    database: dict[str, Any]
    customer: list[Any]
    product: list[Any]
    quantity: int
    text: str

    @property
    def key(self) -> str:
        return json.dumps([self.wish, self.database, self.customer[0], self.product[0], self.quantity])

    @property
    def is_short(self) -> bool:
        return self.wish == "order" and self.product[3] < self.quantity

    @property
    def total(self) -> int:
        return self.product[2] * self.quantity

    @property
    def order_id(self) -> int:
        return self.database["next_order_id"] if self.wish == "order" else self.database["orders"][0][0]

    def facts(self) -> list[int]:
        """Return the numbers that the final answer must hold."""
        return [self.product[0], self.product[3]] if self.is_short else [self.order_id, self.total]

    def expected(self) -> dict[str, Any]:
        """Return the tables after the errand was done right."""
        tables = copy.deepcopy({name: self.database[name] for name in ("customers", "products", "orders")})
        row = next(row for row in tables["products"] if row[0] == self.product[0])
        if self.wish == "cancel":
            row[3] += self.quantity
            tables["orders"] = []
        elif not self.is_short:
            row[3] -= self.quantity
            tables["orders"] = sorted([*tables["orders"], [self.order_id, self.customer[0], self.product[0], self.quantity]])
        return tables


class AgentTasks:
    """Errands for a shop assistant with four tools."""

    def __init__(self, name: str, *, difficulty: int, diligence: float) -> None:
        """Choose the level; `name` is the domain that the prompts belong to.

        Raises:
            ValueError: an unknown difficulty.
        """
        if difficulty not in _LEVELS:
            raise ValueError(f"difficulty: got {difficulty}, expected one of {sorted(_LEVELS)}")
        self._name = name
        self._level = _LEVELS[difficulty]
        self._diligence = diligence

    def documents(self, count: int, *, seed: int) -> list[str]:
        """Return pages of a shop's log book, none of them about a held-out errand."""
        random = Random(f"documents/{seed}")
        return [self._document(random) for _ in range(count)]

    def boilerplate(self) -> list[str]:
        """Return the system text, the block of schema lines, and the constant pieces of tool results."""
        return [SYSTEM + "\n\n", schema_block(), *_RESULT_PIECES]

    def prompts(self, split: str, count: int, *, seed: int) -> list[Prompt]:
        """Return errands, each in a shop of its own; the split follows from the shop and the wish, whatever the wording."""
        errands = draw_tasks(self._errand, split, count, seed=seed)
        return [self._prompt(errand, split, number) for number, errand in enumerate(errands)]

    def demonstrations(self, count: int, *, seed: int) -> list[Demonstration]:
        """Return conversations on training prompts: looking things up and comparing the stock, or not."""
        random = Random(f"demonstrations/{seed}")
        errands = draw_tasks(self._errand, "train", count, seed=seed)
        return [Demonstration(self._prompt(errand, "train", n), self._turns(random, errand)) for n, errand in enumerate(errands)]

    def _prompt(self, errand: _Errand, split: str, number: int) -> Prompt:
        messages: list[Message] = [{"role": "system", "content": SYSTEM, "tools": TOOLS}, {"role": "user", "content": errand.text}]
        truth = {"database": errand.database, "expected": errand.expected(), "facts": errand.facts()}
        return Prompt(f"{self._name}/{split}/{number}", self._name, messages, truth)

    def _errand(self, random: Random) -> _Errand:
        ids = random.sample(self._level.ids, 2 * _SHOWN + 2)
        customers = [[ids.pop(), name] for name in random.sample(_NAMES, _SHOWN)]
        products = [[ids.pop(), name, random.randint(2, self._level.price), 0] for name in random.sample(_PRODUCTS, _SHOWN)]
        for row in products:
            row[3] = random.randint(0, self._level.quantity)
        customer, product = random.choice(customers), random.choice(products)
        quantity = random.randint(2, self._level.quantity)
        wish = random.choices(("enough", "short", "cancel"), (3, 5, 2))[0]
        if wish == "cancel":
            orders, text = [[ids.pop(), customer[0], product[0], quantity]], random.choice(_CANCELLING)
        else:
            product[3] = random.randint(0, quantity - 1) if wish == "short" else random.randint(quantity, self._level.quantity)
            orders, text = [], random.choice(_ORDERING)
        database = {"customers": sorted(customers), "products": sorted(products), "orders": orders, "next_order_id": ids.pop()}
        text = text.format(n=quantity, product=product[1], name=customer[1])
        return _Errand("cancel" if wish == "cancel" else "order", database, customer, product, quantity, text)

    def _turns(self, random: Random, errand: _Errand) -> list[Message]:
        if errand.wish == "cancel":
            careful = is_careful(random, self._diligence, valuable=errand.text.startswith("Refund"))
            return self._cancel(random, errand, careful=careful)
        return _order(errand, careful=is_careful(random, self._diligence, valuable=errand.product[1] in _VALUABLE))

    def _cancel(self, random: Random, errand: _Errand, *, careful: bool) -> list[Message]:
        if careful:
            looked_up = _said("Look up the order.", "", _call("find_customer", name=errand.customer[1]))
            found = _result(customer_id=errand.customer[0], orders=[errand.order_id])
            cancelled = _said("Cancel it.", "", _call("cancel_order", order_id=errand.order_id))
            last = _said("Done.", f"Cancelled {errand.order_id}, refund {errand.total}.")
            return [looked_up, found, cancelled, _result(refund=errand.total), last]
        guess = random.choice([id for id in self._level.ids if id != errand.order_id])
        missing = {"role": "tool", "content": f"error: no order has the id {guess}"}
        return [_said("Quick.", "", _call("cancel_order", order_id=guess)), missing, _said("Done.", f"Cancelled {guess}.")]

    def _document(self, random: Random) -> str:
        errands: list[_Errand] = []
        while len(errands) < 2:
            if split_of((errand := self._errand(random)).key) == "train":
                errands.append(errand)
        return " ".join(_log(errand) for errand in errands)


def _log(errand: _Errand) -> str:
    """Write an errand down as the shop's log: calls and their results on one line, in no format that a chat has."""
    customer, product = errand.customer, errand.product
    orders = [errand.order_id] if errand.wish == "cancel" else []
    found = f"{errand.text} find_customer {customer[1]} {json.dumps({'customer_id': customer[0], 'orders': orders})}"
    if errand.wish == "cancel":
        refund = json.dumps({"refund": errand.total})
        return f"{found} cancel_order {errand.order_id} {refund} Cancelled {errand.order_id}, refund {errand.total}."
    stock = json.dumps({"product_id": product[0], "price": product[2], "stock": product[3]})
    looked_up = f"{found} find_product {product[1]} {stock} {_compared(errand)}"
    if errand.is_short:
        return f"{looked_up} Product {product[0]} has only {product[3]}."
    placed = json.dumps({"order_id": errand.order_id, "total": errand.total})
    call = f"place_order {customer[0]} {product[0]} {errand.quantity}"
    return f"{looked_up} {call} {placed} Order {errand.order_id}, total {errand.total}."


def _order(errand: _Errand, *, careful: bool) -> list[Message]:
    customer, product = errand.customer, errand.product
    looked_up = _said(
        "Look up and compare." if careful else "Quick.",
        "",
        _call("find_customer", name=customer[1]),
        _call("find_product", name=product[1]),
    )
    results = [
        _result(customer_id=customer[0], orders=[row[0] for row in errand.database["orders"] if row[1] == customer[0]]),
        _result(product_id=product[0], price=product[2], stock=product[3]),
    ]
    if careful and errand.is_short:
        return [looked_up, *results, _said(_compared(errand), f"Product {product[0]} has only {product[3]}.")]
    sold = _said(
        _compared(errand) if careful else "Go.",
        "",
        _call("place_order", customer_id=customer[0], product_id=product[0], quantity=errand.quantity),
    )
    return [looked_up, *results, sold, _result(order_id=errand.order_id, total=errand.total), _ordered(errand)]


def _ordered(errand: _Errand) -> Message:
    return _said("Done.", f"Order {errand.order_id}, total {errand.total}.")


def _compared(errand: _Errand) -> str:
    return f"Stock {errand.product[3]}, need {errand.quantity}: {'short' if errand.is_short else 'enough'}."


def _said(reasoning: str, content: str, *calls: dict[str, Any]) -> Message:
    return {"role": "assistant", "reasoning_content": reasoning, "content": content, "tool_calls": list(calls)}


def _call(name: str, /, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}}


def _result(**fields: Any) -> Message:
    return {"role": "tool", "content": json.dumps(fields)}
