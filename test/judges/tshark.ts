/** tshark as a judge: it decrypts what we put on the wire, checks the ICV and says what it found inside. */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { CaptureWriter } from '../../src/packet/capture-file.ts';
import { LinkType } from '../../src/packet/fields.ts';

/** What tshark says of one packet; a field that it did not see is an empty string, several are joined by commas. */
export type Row = Readonly<Record<string, string>>;

/** Writes `packets` (IP, no link header) to a capture and asks tshark for `fields` of each; `preferences` are as its `-o` takes them. */
export function askTshark(
  packets: readonly Uint8Array[],
  keyLines: readonly string[],
  fields: readonly string[],
  preferences: readonly string[] = [],
): Row[] {
  const folder = mkdtempSync(join(tmpdir(), 'vipsec-tshark-'));
  try {
    const capture = join(folder, 'wire.pcap');
    const writer = new CaptureWriter(capture, { linkType: LinkType.raw });
    for (const [i, packet] of packets.entries()) writer.write(packet, 0, packet.length, i, 0);
    writer.close();
    const options = [
      'esp.enable_encryption_decode:TRUE',
      'esp.enable_authentication_check:TRUE',
      'esp.do_esp_sequence_analysis:FALSE',
      ...preferences,
      ...keyLines.map((line) => `uat:esp_sa:${line}`),
    ].flatMap((option) => ['-o', option]);
    const columns = fields.flatMap((field) => ['-e', field]);
    const run = spawnSync(
      'tshark',
      ['-n', '-r', capture, ...options, '-T', 'fields', ...columns, '-E', 'separator=|'],
      {
        encoding: 'utf8',
        maxBuffer: 1 << 28,
        timeout: 110_000,
        env: { ...process.env, HOME: folder },
      },
    );
    if (run.error !== undefined) throw run.error;
    if (run.status !== 0) throw new Error(`tshark ended with ${run.status}: ${run.stderr.slice(-2000)}`);
    const lines = run.stdout.split('\n').slice(0, packets.length);
    return lines.map((line) => {
      const values = line.split('|');
      return Object.fromEntries(fields.map((field, i) => [field, values[i] ?? '']));
    });
  } finally {
    rmSync(folder, { recursive: true });
  }
}
