/**
 * Tables as text, for the commands that print one: what lays them out takes a while to load.
 */
import Table from 'cli-table3';

/** Columns two spaces apart and nothing else: reads the same on a terminal, in a file and in a mail. */
const PlainTable = {
  chars: Object.fromEntries(
    ['top', 'bottom', 'left', 'right', 'mid'].flatMap((side) => [
      [side, ''],
      [`${side}-mid`, ''],
      [`${side}-left`, ''],
      [`${side}-right`, ''],
    ]),
  ),
  style: { head: [], border: [], 'padding-left': 0, 'padding-right': 0 },
};

/** A table as text, its head underlined; columns of numbers are aligned to the right. A head of empty names is left out. */
export function table(head: readonly string[], rows: readonly (readonly (string | number | bigint)[])[]): string {
  const lines = new Table({
    ...PlainTable,
    chars: { ...PlainTable.chars, middle: '  ' },
    colAligns: head.map((_, column) =>
      rows.length > 0 && rows.every((row) => isNumber(row[column])) ? 'right' : 'left',
    ),
  });
  const named = head.some((name) => name !== '');
  if (named) lines.push([...head], underline(head, rows));
  for (const row of rows) lines.push(row.map(String));
  return lines
    .toString()
    .split('\n')
    .map((line) => line.trimEnd())
    .join('\n');
}

function underline(head: readonly string[], rows: readonly (readonly unknown[])[]): string[] {
  return head.map((name, column) =>
    '-'.repeat(Math.max(name.length, ...rows.map((row) => String(row[column]).length))),
  );
}

function isNumber(cell: string | number | bigint | undefined): boolean {
  return typeof cell === 'number' || typeof cell === 'bigint';
}
