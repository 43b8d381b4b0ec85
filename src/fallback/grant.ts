/**
 * The way from the data path to an SA's lifetime: taken when a grant is used up (`lifetime.ts`).
 */
import type { DataPath } from './burst.ts';
import { RECORD, SaKind, SaWord } from './sa-table.ts';
import { Verdict } from './verdict.ts';

/** Asks for a grant that covers one more packet of `bytes` bytes. An SA that has ended costs nothing but a look. */
export function renewGrant(path: DataPath, record: number, bytes: number): number {
  const kind = path.table.words[record + SaWord.kind];
  if ((kind & SaKind.expired) !== 0) return Verdict.expired;
  if ((kind & SaKind.exhausted) !== 0) return Verdict.sequenceOverflow;
  const slot = record / RECORD;
  const lifetime = path.lifetimes[slot];
  if (lifetime === undefined) return Verdict.noSa;
  const handle = path.table.words[record + SaWord.handle];
  return lifetime.renew(path.table, slot, bytes, (event) => path.events.push({ handle, event }));
}
