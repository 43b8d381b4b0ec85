import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { CHECKS } from '../../src/conform/index.ts';

/** A row of the tables in `docs/conformance.md`. */
interface Row {
  readonly section: string;
  readonly statements: number;
  readonly ids: readonly string[];
  readonly untried: number;
  readonly note: string;
}

/** `INI-001 to 003, RST-004` as single ids. */
function idsOf(text: string): string[] {
  return text.split(', ').flatMap((part) => {
    const [first, last] = part.split(' to ');
    const [area, from] = first.split('-');
    const to = Number(last ?? from);
    return Array.from({ length: to - Number(from) + 1 }, (_, i) => {
      return `${area}-${String(Number(from) + i).padStart(3, '0')}`;
    });
  });
}

const rows: Row[] = readFileSync(new URL('../../docs/conformance.md', import.meta.url), 'utf8')
  .split('\n')
  .filter((line) => /^\| \d/.test(line))
  .map((line) => line.split('|').map((cell) => cell.trim()))
  .map(([, section, , statements, checks, untried, note]) => ({
    section,
    statements: Number(statements),
    ids: idsOf(checks),
    untried: Number(untried),
    note,
  }));

describe('the table of what the conformance suite covers', () => {
  it('has every check once, in the row of its section', () => {
    expect(rows.flatMap(({ ids }) => ids).sort()).toEqual(CHECKS.map(({ id }) => id).sort());
    for (const { section, ids } of rows) {
      for (const id of ids) expect(CHECKS.find((check) => check.id === id)?.section, id).toBe(section);
    }
  });

  it('has no section twice', () => {
    const sections = rows.map(({ section }) => section);
    expect(new Set(sections).size).toBe(sections.length);
    expect(sections.length).toBeGreaterThan(60);
  });

  it('counts what cannot be tried', () => {
    for (const { section, ids, untried } of rows) {
      const checks = CHECKS.filter(({ id }) => ids.includes(id));
      expect(checks.filter((check) => 'untestable' in check).length, section).toBe(untried);
    }
  });

  it('has a check for each normative statement, or says how several are one', () => {
    for (const { section, statements, ids, note } of rows) {
      if (ids.length < statements) expect(note, section).not.toBe('');
      else expect(note, section).toBe('');
    }
  });
});
