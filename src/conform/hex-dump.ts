/** Bytes as a person reads them. */

const ROW = 16;
const MAX_ROWS = 8;

/** Rows of 16 bytes with their offsets, indented by two spaces; only the first 128 bytes. */
export function hexDump(bytes: Uint8Array): string {
  const rows: string[] = [];
  for (let at = 0; at < bytes.length && rows.length < MAX_ROWS; at += ROW) {
    const pairs = Array.from(bytes.subarray(at, at + ROW), (byte) => byte.toString(16).padStart(2, '0'));
    rows.push(`  ${at.toString(16).padStart(4, '0')}  ${pairs.join(' ')}`);
  }
  if (bytes.length > ROW * MAX_ROWS) rows.push(`  …     ${bytes.length - ROW * MAX_ROWS} more`);
  return rows.length === 0 ? '  (nothing)' : rows.join('\n');
}
