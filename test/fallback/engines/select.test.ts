import { afterEach, describe, expect, it } from 'vitest';
import { EngineError } from '../../../src/fallback/engines/engine.ts';
import { ENGINE_NAMES, type EngineChoice, Engines } from '../../../src/fallback/engines/select.ts';
import { TRANSFORMS, transformById } from '../../../src/fallback/engines/transform.ts';
import { mapAnonymous, unmapMemory } from '../../../src/sys/memory.ts';

function withEngines<T>(choice: EngineChoice, use: (engines: Engines) => T): T {
  const memory = mapAnonymous(4096);
  const engines = new Engines(memory, choice);
  try {
    return use(engines);
  } finally {
    engines.close();
    unmapMemory(memory);
  }
}

function transformNamed(id: string) {
  const transform = transformById(id);
  if (transform === undefined) throw new Error(`no transform ${id}`);
  return transform;
}

const variable = 'VIPSEC_IPSEC_MB';
const before = process.env[variable];
afterEach(() => {
  if (before === undefined) delete process.env[variable];
  else process.env[variable] = before;
});

describe('the choice of an engine', () => {
  it('finds one for every transform', () => {
    withEngines('auto', (engines) => {
      for (const transform of TRANSFORMS) expect(engines.select(transform).engine.supports(transform)).toBe(true);
    });
  });

  it('is the fastest that can, with a reason for each faster one that cannot', () => {
    withEngines('auto', (engines) => {
      for (const transform of TRANSFORMS) {
        const { engine, passedOver } = engines.select(transform);
        const position = ENGINE_NAMES.indexOf(engine.name);
        expect(passedOver.map(({ name }) => name)).toEqual(ENGINE_NAMES.slice(0, position));
        for (const { refusal } of passedOver) expect(refusal.code).toMatch(/^(ENGINE|TRANSFORM)_/);
      }
    });
  });

  it('stays with what it chose', () => {
    withEngines('auto', (engines) => {
      expect(engines.select(TRANSFORMS[0])).toBe(engines.select(TRANSFORMS[0]));
    });
  });

  it.each(['openssl', 'noble'] as const)('is %s alone when that was asked for', (name) => {
    withEngines(name, (engines) => {
      const selection = engines.select(transformNamed('aes-256-gcm-16'));
      expect(selection.engine.name).toBe(name);
      expect(selection.passedOver).toEqual([]);
    });
  });

  it('refuses what the only engine allowed cannot do', () => {
    withEngines('noble', (engines) => {
      expect(() => engines.select(transformNamed('3des-cbc+hmac-sha1-12'))).toThrow(
        expect.objectContaining({ code: 'TRANSFORM_UNSUPPORTED' }),
      );
    });
  });

  it.each([
    ['is not there', 'libnothing-here.so.9', 'ENGINE_LIBRARY_MISSING'],
    ['is another library', 'libm.so.6', 'ENGINE_VERSION_UNKNOWN'],
  ])('goes on with openssl when libipsec-mb %s, and says so', (_, library, code) => {
    process.env[variable] = library;
    withEngines('auto', (engines) => {
      const { engine, passedOver } = engines.select(transformNamed('aes-128-gcm-16'));
      expect(engine.name).toBe('openssl');
      expect(passedOver.map(({ name, refusal }) => [name, refusal.code])).toEqual([['ipsec-mb', code]]);
      expect(engines.reports()[0]).toMatchObject({ name: 'ipsec-mb', version: undefined, refusal: { code } });
    });
    withEngines('ipsec-mb', (engines) => {
      expect(() => engines.select(transformNamed('aes-128-gcm-16'))).toThrow(EngineError);
    });
  });

  it('reports each engine with its version or the reason why it cannot be had', () => {
    withEngines('auto', (engines) => {
      const reports = engines.reports();
      expect(reports.map(({ name }) => name)).toEqual(ENGINE_NAMES);
      for (const { version, refusal } of reports)
        expect((version === undefined) !== (refusal === undefined)).toBe(true);
      expect(reports[1].version).toMatch(/^OpenSSL 3\./);
    });
  });
});
