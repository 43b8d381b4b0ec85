import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import { startVipsec, vipsec, vipsecProcess } from './vipsec.ts';

const { version } = JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8'));

describe('the command line', () => {
  test('prints its version', async () => {
    expect(await vipsecProcess(['--version'])).toMatchObject({ code: 0, stdout: `${version}\n`, stderr: '' });
  });

  test.each([
    [['--help']],
    [['help']],
    [['help', 'probe']],
    [['esp', '--help']],
    [['device', '-h']],
    [['demo', '--help']],
  ])('prints help for %j to stdout', async (args) => {
    const { code, stdout, stderr } = await vipsec(args);
    expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
    expect(stdout).toMatch(/^Usage: vipsec /);
  });

  test('without a command prints help to stderr and is wrong usage', async () => {
    const { code, stdout, stderr } = await vipsecProcess([]);
    expect({ code, stdout }).toEqual({ code: 2, stdout: '' });
    expect(stderr).toMatch(/^Usage: vipsec /);
  });

  test.each([
    [['bogus']],
    [['--bogus']],
    [['esp']],
    [['esp', '--sa', 'a', '--in', 'b', '--out', 'c', '--engine', 'abacus']],
    [['probe']],
    [['probe', 'a', 'b']],
    [['device']],
  ])('answers %j with one line, a code, a hint and exit code 2', async (args) => {
    const { code, stdout, stderr } = await vipsec(args);
    expect({ code, stdout }).toEqual({ code: 2, stdout: '' });
    const [error, hint, ...more] = stderr.split('\n');
    expect(error).toMatch(/^vipsec: error: .+ \[[A-Z_]+\]$/);
    expect(hint).toMatch(/^hint: /);
    expect(more).toEqual(['']);
  });

  test('shows a stack trace only with VIPSEC_DEBUG=1', async () => {
    const args = ['probe', 'vfio-user:/nonexistent'];
    const plain = await vipsecProcess(args);
    expect(plain.code).toBe(1);
    expect(plain.stderr).not.toMatch(/\n\s+at /);
    const debug = await vipsec(args, { env: { VIPSEC_DEBUG: '1' } });
    expect(debug.code).toBe(1);
    expect(debug.stderr).toMatch(/\n\s+at /);
  });

  test('ends quietly when nobody reads its output', async () => {
    const child = startVipsec(['--help']);
    child.stdout?.destroy();
    let stderr = '';
    child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      stderr += text;
    });
    const [code, signal] = await once(child, 'close');
    expect({ stderr, signal }).toEqual({ stderr: '', signal: null });
    expect(code).toBe(0);
  });
});
