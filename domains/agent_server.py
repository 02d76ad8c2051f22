"""The shop's databases and tools. Runs inside the sandbox, standard library only; one JSON line in, one out.

It knows the databases and executes calls; what a task expects is never told to it. A wrong call is answered in words, and no call, however
it was made, ends the program.
"""

import json
import sqlite3
import sys

_TABLES = {
    "customers": ("id", "name"),
    "products": ("id", "name", "price", "stock"),
    "orders": ("id", "customer_id", "product_id", "quantity"),
}
_SCHEMA = """
CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT NOT NULL);
CREATE TABLE products (id INTEGER PRIMARY KEY, name TEXT NOT NULL, price INTEGER NOT NULL, stock INTEGER NOT NULL);
CREATE TABLE orders (
    id INTEGER PRIMARY KEY,
    customer_id INTEGER NOT NULL REFERENCES customers (id),
    product_id INTEGER NOT NULL REFERENCES products (id),
    quantity INTEGER NOT NULL
);
"""
_LARGEST = 10**9


class CallError(Exception):
    """A call that cannot be done, said in words for the model."""


class Shop:
    """One episode's database."""

    def __init__(self, database: dict) -> None:
        """Fill an SQLite database in memory from `{"customers", "products", "orders", "next_order_id"}`, rows as in `_TABLES`."""
        self._db = sqlite3.connect(":memory:", isolation_level=None)
        self._db.executescript(_SCHEMA)
        for table, columns in _TABLES.items():
            marks = ", ".join("?" * len(columns))
            self._db.executemany(f"INSERT INTO {table} VALUES ({marks})", database[table])
        self._next_order_id = database["next_order_id"]

    def find_customer(self, name: str) -> dict:
        """Look a customer up by name."""
        (customer_id,) = self._row("SELECT id FROM customers WHERE name = ?", name, f"no customer is named {name}")
        orders = self._db.execute("SELECT id FROM orders WHERE customer_id = ? ORDER BY id", (customer_id,)).fetchall()
        return {"customer_id": customer_id, "orders": [row[0] for row in orders]}

    def find_product(self, name: str) -> dict:
        """Look a product up by name."""
        row = self._row("SELECT id, price, stock FROM products WHERE name = ?", name, f"no product is named {name}")
        return {"product_id": row[0], "price": row[1], "stock": row[2]}

    def place_order(self, customer_id: int, product_id: int, quantity: int) -> dict:
        """Sell; that the stock suffices is the seller's business."""
        self._row("SELECT id FROM customers WHERE id = ?", customer_id, f"no customer has the id {customer_id}")
        (price,) = self._row("SELECT price FROM products WHERE id = ?", product_id, f"no product has the id {product_id}")
        if quantity < 1:
            raise CallError("quantity must be at least 1")
        order_id, self._next_order_id = self._next_order_id, self._next_order_id + 1
        self._db.execute("INSERT INTO orders VALUES (?, ?, ?, ?)", (order_id, customer_id, product_id, quantity))
        self._db.execute("UPDATE products SET stock = stock - ? WHERE id = ?", (quantity, product_id))
        return {"order_id": order_id, "total": price * quantity}

    def cancel_order(self, order_id: int) -> dict:
        """Cancel: the goods return to the stock."""
        row = self._row("SELECT product_id, quantity FROM orders WHERE id = ?", order_id, f"no order has the id {order_id}")
        (price,) = self._row("SELECT price FROM products WHERE id = ?", row[0], "the product is gone")
        self._db.execute("DELETE FROM orders WHERE id = ?", (order_id,))
        self._db.execute("UPDATE products SET stock = stock + ? WHERE id = ?", (row[1], row[0]))
        return {"refund": price * row[1]}

    def dump(self) -> dict:
        """Return every table's rows, ordered by id."""
        return {table: [list(row) for row in self._db.execute(f"SELECT * FROM {table} ORDER BY id")] for table in _TABLES}

    def close(self) -> None:
        """Forget the database."""
        self._db.close()

    def _row(self, query: str, value: int | str, missing: str) -> tuple:
        row = self._db.execute(query, (value,)).fetchone()
        if row is None:
            raise CallError(missing)
        return row


TOOLS: dict[str, dict[str, type]] = {
    "find_customer": {"name": str},
    "find_product": {"name": str},
    "place_order": {"customer_id": int, "product_id": int, "quantity": int},
    "cancel_order": {"order_id": int},
}
"""Name of each tool to its arguments, all required."""


def call(shop: Shop, name: str, arguments: dict) -> str:
    """Execute one call and return its result as text: JSON, or `error:` and words."""
    try:
        return json.dumps(getattr(shop, _checked(name, arguments))(**arguments))
    except CallError as error:
        return f"error: {error}"


def _checked(name: str, arguments: dict) -> str:
    if name not in TOOLS:
        raise CallError("unknown tool, there are " + ", ".join(TOOLS))
    wanted = TOOLS[name]
    for key, kind in wanted.items():
        if key not in arguments:
            raise CallError(f"{name} needs {key}")
        if type(arguments[key]) is not kind or not _sane(arguments[key]):
            raise CallError(f"{key} must be {'a short text' if kind is str else 'an integer'}")
    if len(arguments) > len(wanted):
        raise CallError(f"{name} takes only " + ", ".join(wanted))
    return name


def _sane(value: int | str) -> bool:
    """Say whether SQLite can hold the value and an answer can quote it."""
    return len(value) <= 40 and value.isprintable() if isinstance(value, str) else abs(value) <= _LARGEST


def handle(shops: dict, request: dict) -> dict:
    """Serve one request: open episodes, execute calls in order, or finish episodes.

    Args:
        shops: handle to Shop, changed in place.
        request: `{"open": [[handle, database]]}`, `{"calls": [[handle, [[name, arguments]]]]}` or `{"finish": [handle]}`.
    """
    for handle_, database in request.get("open", []):
        shops[handle_] = Shop(database)
    results = [[call(shops[handle_], name, arguments) for name, arguments in calls] for handle_, calls in request.get("calls", [])]
    dumps = []
    for handle_ in request.get("finish", []):
        shop = shops.pop(handle_)
        dumps.append(shop.dump())
        shop.close()
    return {"results": results, "databases": dumps}


def main() -> None:
    """Answer requests until the input ends."""
    shops: dict[int, Shop] = {}
    for line in sys.stdin:
        sys.stdout.write(json.dumps(handle(shops, json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
