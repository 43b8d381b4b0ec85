import { execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import {
  closeSync,
  existsSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { startVipsec, vipsec, vipsecProcess } from './vipsec.ts';

const data = fileURLToPath(new URL('../data/', import.meta.url));
const program = fileURLToPath(new URL('../../dist/tools/vipsec.js', import.meta.url));
const key = 'deadbeefcafef00d0123456789abcdef';
const outbound = {
  direction: 'outbound',
  mode: 'tunnel',
  spi: '0x1001',
  aead: { name: 'aes-gcm', key, salt: '0badcafe' },
  tunnel: { source: '192.0.2.1', destination: '192.0.2.2' },
};
const inbound = { ...outbound, direction: 'inbound' };

let folder = '';
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'vipsec-esp-cli-'));
});
afterEach(() => {
  rmSync(folder, { recursive: true });
});

const at = (name: string): string => join(folder, name);

function saFile(name: string, ...sas: unknown[]): string {
  writeFileSync(at(name), JSON.stringify({ sas }), { mode: 0o600 });
  return at(name);
}

function esp(sa: string, input: string, output: string, ...more: string[]) {
  return vipsec(['esp', '--sa', sa, '--in', input, '--out', output, ...more]);
}

describe('vipsec esp', () => {
  test('protects and verifies a capture; both reports are one JSON document', async () => {
    const input = join(data, 'http-ipv4.pcap');
    const out = await esp(saFile('out.json', outbound), input, at('esp.pcap'), '--json');
    expect(out).toMatchObject({ code: 0, stderr: '' });
    expect(out.stdout.trim().split('\n')).toHaveLength(1);
    const report = JSON.parse(out.stdout);
    expect(report).toEqual({
      in: 54,
      out: 54,
      protected: 52,
      verified: 0,
      bypassed: 2,
      dropped: expect.objectContaining({
        icv: 0,
        replay: 0,
        malformed: 0,
        'no-sa': 0,
        expired: 0,
        'sequence-overflow': 0,
      }),
      dummy: 0,
    });
    const sas = saFile('in.json', inbound);
    const back = await vipsecProcess(['esp', '--sa', sas, '--in', at('esp.pcap'), '--out', at('back.pcap'), '--json']);
    expect(back.code).toBe(0);
    expect(JSON.parse(back.stdout)).toMatchObject({ verified: 52, bypassed: 2, out: 54 });
    expect(readFileSync(at('back.pcap')).equals(readFileSync(input))).toBe(true);
  });

  test.each(['openssl', 'noble'])('gives the same bytes with the engine %s', async (engine) => {
    const input = join(data, 'dns-ipv6.pcap');
    const sa = saFile('sa.json', outbound);
    expect((await esp(sa, input, at('auto.pcap'))).code).toBe(0);
    expect((await esp(sa, input, at('one.pcap'), '--engine', engine)).code).toBe(0);
    expect(readFileSync(at('one.pcap')).equals(readFileSync(at('auto.pcap')))).toBe(true);
  });

  test('ends with 3 when packets were rejected, and still writes the others', async () => {
    await esp(saFile('out.json', outbound), join(data, 'ping-ipv4.pcap'), at('esp.pcap'));
    const bytes = readFileSync(at('esp.pcap'));
    bytes[bytes.length - 1] ^= 1;
    writeFileSync(at('bad.pcap'), bytes);
    const { code, stdout } = await esp(saFile('in.json', inbound), at('bad.pcap'), at('back.pcap'), '--json');
    expect(code).toBe(3);
    const report = JSON.parse(stdout);
    expect(report.dropped.icv).toBe(1);
    expect(report.out).toBe(report.in - 1);
    expect(existsSync(at('back.pcap'))).toBe(true);
  });

  test('prints a table for people', async () => {
    const { code, stdout } = await esp(saFile('sa.json', outbound), join(data, 'ping-ipv4.pcap'), at('esp.pcap'));
    expect(code).toBe(0);
    expect(stdout).toMatch(/packets in +18\n/);
    expect(stdout).toMatch(/protected +16\n/);
  });

  test('writes a decryption file for its owner only', async () => {
    const args = ['--esp-keys', at('esp_sa')];
    const { code } = await esp(saFile('sa.json', outbound), join(data, 'ping-ipv4.pcap'), at('esp.pcap'), ...args);
    expect(code).toBe(0);
    expect(readFileSync(at('esp_sa'), 'utf8')).toBe(
      `"IPv4","192.0.2.1","192.0.2.2","0x00001001","AES-GCM with 16 octet ICV [RFC4106]","0x${key}0badcafe","NULL",""\n`,
    );
    expect(statSync(at('esp_sa')).mode & 0o777).toBe(0o600);
  });

  test('reads from a pipe and writes to one', async () => {
    const sa = saFile('sa.json', outbound);
    const command = `cat "$1" | "$2" "$3" esp --sa "$4" --in /dev/stdin --out /dev/stdout --json 2>/dev/null | head -c 24 | od -An -tx1`;
    const child = spawn('sh', ['-c', command, 'sh', join(data, 'ping-ipv4.pcap'), process.execPath, program, sa]);
    let stdout = '';
    child.stdout.setEncoding('utf8').on('data', (text: string) => {
      stdout += text;
    });
    await once(child, 'close');
    expect(stdout).toMatch(/^ d4 c3 b2 a1 02 00 04 00/);
  });

  test('ends by SIGTERM while the pipe that it reads from says nothing, and leaves nothing', async () => {
    execFileSync('mkfifo', [at('in')]);
    // Of both directions, since one for writing alone waits for a reader.
    const pipe = openSync(at('in'), 'r+');
    try {
      writeSync(pipe, readFileSync(join(data, 'http-ipv4.pcap')));
      const args = ['--in', at('in'), '--out', at('esp.pcap'), '--engine', 'openssl'];
      const child = startVipsec(['esp', '--sa', saFile('sa.json', outbound), ...args]);
      const ended = once(child, 'exit');
      const begun = (): boolean => readdirSync(folder).some((name) => name.endsWith('.part'));
      while (!begun() && child.exitCode === null) await sleep(20);
      child.kill('SIGTERM');
      expect(await ended).toEqual([null, 'SIGTERM']);
      expect(readdirSync(folder).sort()).toEqual(['in', 'sa.json']);
    } finally {
      closeSync(pipe);
    }
  });

  test('keeps its memory small however large the capture is', async () => {
    const capture = readFileSync(join(data, 'bulk-ipv4.pcap'));
    const large = Buffer.concat([capture.subarray(0, 24), ...new Array(1000).fill(capture.subarray(24))]);
    writeFileSync(at('large.pcap'), large);
    const args = [
      'esp',
      '--sa',
      saFile('sa.json', outbound),
      '--in',
      at('large.pcap'),
      '--out',
      at('esp.pcap'),
      '--json',
    ];
    const child = spawn(process.execPath, [program, ...args], { stdio: 'ignore' });
    let peak = 0;
    const timer = setInterval(() => {
      try {
        const status = readFileSync(`/proc/${child.pid}/status`, 'utf8');
        peak = Math.max(peak, Number(/VmHWM:\s+(\d+)/.exec(status)?.[1] ?? 0));
      } catch {
        // It has ended.
      }
    }, 10);
    const [code] = await once(child, 'close');
    clearInterval(timer);
    expect(code).toBe(0);
    expect(peak).toBeGreaterThan(10_000);
    // The capture has 122 MiB; Node alone takes some 50.
    expect(large.length).toBeGreaterThan(120e6);
    expect(peak).toBeLessThan(110_000);
  });
});

describe('what vipsec esp is given wrongly', () => {
  const good = join(data, 'ping-ipv4.pcap');

  test.each<[string, () => [string, string, string, ...string[]], string]>([
    ['no SA file', () => [at('none'), good, at('o')], 'SA_FILE_UNREADABLE'],
    ['an SA file without SAs', () => [saFile('sa'), good, at('o')], 'SA_FILE_EMPTY'],
    ['SPI 0', () => [saFile('sa', { ...outbound, spi: 0 }), good, at('o')], 'SA_VALUE'],
    [
      'a key that is too short',
      () => [saFile('sa', { ...outbound, aead: { ...outbound.aead, key: key.slice(2) } }), good, at('o')],
      'SA_KEY_LENGTH',
    ],
    [
      'two outbound SAs of one key',
      () => [saFile('sa', outbound, { ...outbound, spi: 9 }), good, at('o')],
      'SA_KEY_REUSED',
    ],
    ['no capture', () => [saFile('sa', outbound), at('none'), at('o')], 'CAPTURE_UNREADABLE'],
    ['a capture that is none', () => [saFile('sa', outbound), join(data, 'README.md'), at('o')], 'CAPTURE_FORMAT'],
    [
      'a capture that is cut short',
      () => {
        writeFileSync(at('cut'), readFileSync(good).subarray(0, 2000));
        return [saFile('sa', outbound), at('cut'), at('o')];
      },
      'CAPTURE_TRUNCATED',
    ],
    ['a place that cannot be written', () => [saFile('sa', outbound), good, at('none/o')], 'OUTPUT_UNWRITABLE'],
  ])('%s: exit code 2, one line, no output file, no key', async (_name, prepare, code) => {
    const outcome = await esp(...prepare());
    expect({ code: outcome.code, stdout: outcome.stdout }).toEqual({ code: 2, stdout: '' });
    expect(outcome.stderr).toMatch(new RegExp(`^vipsec: error: .+ \\[${code}\\]\\n(hint: .+\\n)?$`));
    expect(outcome.stderr).not.toMatch(/deadbeef|cafef00d|01234567/);
    expect(existsSync(at('o'))).toBe(false);
    expect(readdirSync(folder).filter((name) => name.endsWith('.part'))).toEqual([]);
  });

  test('an engine that cannot do it, or is not installed, is an error and not another engine', async () => {
    const ccm = { name: 'aes-ccm', key: `${key}0011223344556677`, salt: '0badca' };
    const sa = saFile('sa', { ...outbound, aead: ccm });
    const outcome = await esp(sa, good, at('o'), '--engine', 'ipsec-mb');
    expect(outcome).toMatchObject({ code: 1, stdout: '' });
    expect(outcome.stderr).toMatch(/^vipsec: error: .*ipsec-mb.* \[[A-Z_]+\]\n/);
    expect(existsSync(at('o'))).toBe(false);
  });

  test('the input as output is refused, by another name too', async () => {
    writeFileSync(at('in.pcap'), readFileSync(good));
    symlinkSync(at('in.pcap'), at('link.pcap'));
    for (const output of ['in.pcap', 'link.pcap']) {
      const { code, stderr } = await esp(saFile('sa', outbound), at('in.pcap'), at(output));
      expect(code).toBe(2);
      expect(stderr).toContain('[SAME_FILE]');
    }
    expect(readFileSync(at('in.pcap')).equals(readFileSync(good))).toBe(true);
  });

  test('an SA file that others can read is used with a warning', async () => {
    writeFileSync(at('open.json'), JSON.stringify({ sas: [outbound] }), { mode: 0o644 });
    const { code, stderr } = await esp(at('open.json'), good, at('o'));
    expect(code).toBe(0);
    expect(stderr).toMatch(/^vipsec: warning: .*chmod 600\)\n$/);
  });
});
