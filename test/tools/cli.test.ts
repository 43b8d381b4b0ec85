import { afterEach, describe, expect, test, vi } from 'vitest';
import { InputError, IpsecError } from '../../src/errors.ts';
import { ExitCode, printJson, reportError, unlessAborted } from '../../tools/cli.ts';
import { table } from '../../tools/table.ts';

afterEach(() => {
  vi.restoreAllMocks();
});

/** What `work` writes to a stream. */
function written(stream: NodeJS.WriteStream, work: () => void): string {
  let text = '';
  vi.spyOn(stream, 'write').mockImplementation((chunk) => {
    text += String(chunk);
    return true;
  });
  work();
  return text;
}

describe('a table', () => {
  test('aligns numbers to the right, text to the left, and underlines its head', () => {
    const text = table(
      ['name', 'count'],
      [
        ['a', 1],
        ['longer', 1234567n],
      ],
    );
    expect(text.split('\n')).toEqual(['name      count', '------  -------', 'a             1', 'longer  1234567']);
  });

  test('has no head when the columns have no names, and no space at the ends of lines', () => {
    expect(
      table(
        ['', ''],
        [
          ['a', 'b '],
          ['cc', ''],
        ],
      ),
    ).toBe('a   b\ncc');
  });
});

test('JSON is one line; 64-bit numbers are numbers while they are exact', () => {
  const value = { small: 5n, large: 2n ** 63n, list: [1, 'x'] };
  expect(written(process.stdout, () => printJson(value))).toBe(
    '{"small":5,"large":"9223372036854775808","list":[1,"x"]}\n',
  );
});

describe('an error', () => {
  test.each([
    [
      new InputError('BAD_FILE', 'x\n y', { hint: 'do\nz' }),
      ExitCode.usage,
      'vipsec: error: x y [BAD_FILE]\nhint: do z\n',
    ],
    [new IpsecError('SA_EXISTS', 'twice'), ExitCode.failed, 'vipsec: error: twice [SA_EXISTS]\n'],
    [Object.assign(new Error('no'), { code: 'ENOENT' }), ExitCode.failed, 'vipsec: error: no [ENOENT]\n'],
    ['what', ExitCode.failed, 'vipsec: error: what [UNEXPECTED]\n'],
  ])('is one line and perhaps a hint, with the exit code of its kind (%#)', (error, code, text) => {
    expect(
      written(process.stderr, () => {
        expect(reportError(error)).toBe(code);
      }),
    ).toBe(text);
  });

  test('is what went wrong first when clean-up failed as well', () => {
    const fails = (code: string): never => {
      throw new InputError(code, 'no');
    };
    const work = (): void => {
      using _outer = { [Symbol.dispose]: () => fails('THIRD') };
      using _inner = { [Symbol.dispose]: () => fails('SECOND') };
      fails('FIRST');
    };
    let thrown: unknown;
    try {
      work();
    } catch (error) {
      thrown = error;
    }
    expect(written(process.stderr, () => reportError(thrown))).toBe('vipsec: error: no [FIRST]\n');
  });
});

describe('work that may take for ever', () => {
  test('is waited for until it is done, has failed, or the signal comes', async () => {
    const controller = new AbortController();
    await unlessAborted(Promise.resolve(), controller.signal);
    await expect(unlessAborted(Promise.reject(new Error('no')), controller.signal)).rejects.toThrow('no');
    const endless = unlessAborted(new Promise(() => {}), controller.signal);
    controller.abort();
    await endless;
  });
});
