import { afterAll, describe, expect, it } from 'vitest';
import { validateSa } from '../../src/ipsec/validate.ts';
import { Ipv4, Ipv6, Tcp } from '../../src/packet/fields.ts';
import { espKeysLine } from '../../tools/esp-keys.ts';
import { CASES, realPackets } from './matrix.ts';
import { Ours } from './ours.ts';
import { askTshark } from './tshark.ts';

const ours = new Ours();
afterAll(() => ours[Symbol.dispose]());

/** The smallest packets recorded are TCP acknowledgements. */
const ACK = { 4: realPackets(4, 2)[0], 6: realPackets(6, 2)[0] } as const;

/** One SPI a case, so that tshark's table has one SA for each. Wireshark 4.0 knows no extended sequence numbers. */
const trials = CASES.filter((one) => one.sa.options.esn !== true).map((one, i) => {
  const sa = { ...one.sa, spi: `0x${(0x1000 + i).toString(16)}` };
  const packet = ACK[one.inner];
  return { name: one.name, sa, packet, wire: ours.protect(sa, packet) };
});

/** tshark computes these ICVs itself; of other authenticators it only knows the length. */
const checksIcv = (name: string) => /hmac-|gcm/.test(name);

/** Those of ESP for which tshark has an algorithm, with the line of its table. */
const known = trials.flatMap((trial) => {
  const line = espKeysLine(validateSa({ ...trial.sa, direction: 'outbound' }));
  // Without a tunnel the SA has no addresses: any will do.
  return line === null ? [] : [{ ...trial, line: trial.sa.mode === 'tunnel' ? line : anyAddress(line, trial.packet) }];
});
const ah = trials.filter((trial) => trial.sa.protocol === 'ah');

/** tshark is started once, for all. */
const rows = askTshark(
  [...known, ...ah].map((trial) => trial.wire),
  known.map((trial) => trial.line),
  [
    ...['esp.spi', 'esp.icv_good', 'esp.icv_bad', 'esp.pad_len', 'esp.protocol', 'tcp.seq_raw'],
    ...['ah.spi', 'ah.sequence', 'ah.next_header', '_ws.malformed'],
  ],
);

describe('tshark', () => {
  it('decrypts what we protect, finds the ICV good and the original packet inside', () => {
    const complaints = known.flatMap(({ name, sa, packet }, i) => {
      const row = rows[i];
      const found: string[] = [];
      if (Number(row['esp.spi']) !== Number(sa.spi)) found.push(`SPI ${row['esp.spi']}`);
      if (checksIcv(name) && !/^(1|True)$/.test(row['esp.icv_good'])) found.push(`ICV good: '${row['esp.icv_good']}'`);
      if (/^(1|True)$/.test(row['esp.icv_bad'])) found.push('ICV bad');
      if (row['tcp.seq_raw'] !== tcpSequence(packet)) found.push(`inner TCP sequence number '${row['tcp.seq_raw']}'`);
      return found.map((what) => `${name}: ${what}`);
    });
    expect(complaints.slice(0, 20)).toEqual([]);
    expect(new Set(known.map((trial) => trial.name.split(' ')[1])).size).toBeGreaterThanOrEqual(50);
  });

  it('reads the AH headers that we write', () => {
    const complaints = ah.flatMap((trial, i) => {
      const row = rows[known.length + i];
      const right =
        Number(row['ah.spi']) === Number(trial.sa.spi) &&
        row['ah.sequence'] === trial.sa.initial.sequence &&
        row['_ws.malformed'] === '' &&
        row['tcp.seq_raw'] === tcpSequence(trial.packet);
      return right ? [] : [`${trial.name}: ${JSON.stringify(row)}`];
    });
    expect(complaints.slice(0, 20)).toEqual([]);
    expect(ah.length).toBeGreaterThanOrEqual(40);
  });
});

/** As tshark prints it. */
function tcpSequence(packet: Uint8Array): string {
  const at = (packet[0] >> 4 === 4 ? Ipv4.minLength : Ipv6.length) + Tcp.sequence;
  return String(packet.slice(at, at + 4).reduce((value, byte) => value * 256 + byte, 0));
}

function anyAddress(line: string, packet: Uint8Array): string {
  const family = packet[0] >> 4 === 4 ? '"IPv4"' : '"IPv6"';
  return [family, '"*"', '"*"', ...line.split(',').slice(3)].join(',');
}
